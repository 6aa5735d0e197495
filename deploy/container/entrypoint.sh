#!/bin/sh
# Lays out an empty /data, then hands over to the Bento's own entry point.
set -eu
[ -e "$EASEL_LORAS__REGISTRY" ] || cp "$BENTO_PATH/src/lora_list.json" "$EASEL_LORAS__REGISTRY"
exec "$BENTO_PATH/env/docker/entrypoint.sh" "$@"
