#!/usr/bin/env bash
# Build a Bento and its image: deploy/container/build.sh [cuda|cpu]. With buildah, which needs no
# engine; else with `bentoml containerize` and Docker. FORMAT=oci leaves the health check out, which
# OCI's own image format does not have. WHEELS: a folder with torch's wheel, mounted while building with
# buildah, where no index has it. PACKAGES: more of PyPI's, by their pins. See docs/container.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
flavour=${1:-cuda}
bento_image=localhost/easel-bento:$flavour image=${IMAGE:-localhost/easel:$flavour}
bentoml=${BENTOML:-.venv/bin/bentoml}
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' core/__init__.py)
case $flavour in cuda | cpu) ;; *) echo "no flavour $flavour: cuda or cpu" >&2; exit 2 ;; esac

# The keys are not needed to build; without any, the service would refuse to load.
tag=$(EASEL_AUTH__MODE=off "$bentoml" build -o tag | sed -n 's/^__tag__://p')
bento=$("$bentoml" get "$tag" -o path)
# Read by uv, which installs the Bento's packages: no cache left in the image, torch as the flavour has it.
{
    echo 'no-cache = true'
    if [ -n "${WHEELS:-}" ]; then printf '[pip]\nfind-links = ["%s"]\n' "$WHEELS"; elif [ "$flavour" = cpu ]; then printf '[pip]\ntorch-backend = "cpu"\n'; fi
} > "$bento/env/python/uv.toml"

[ -z "${PACKAGES:-}" ] || tr ' ' '\n' <<< "$PACKAGES" >> "$bento/env/python/requirements.txt"

arguments=(--build-arg "FLAVOUR=$flavour" --build-arg "BENTO=$bento_image" --build-arg "VERSION=$version" -f deploy/container/Dockerfile -t "$image" deploy/container)
if command -v buildah > /dev/null; then
    options=(--format "${FORMAT:-docker}" --pull=false)
    [ -z "${WHEELS:-}" ] || options+=(--volume "$WHEELS:$WHEELS:ro")
    buildah bud "${options[@]}" -t "$bento_image" -f "$bento/env/docker/Dockerfile" "$bento"
    buildah bud "${options[@]}" "${arguments[@]}"
elif command -v docker > /dev/null && docker info > /dev/null 2>&1; then
    "$bentoml" containerize "$tag" --image-tag "$bento_image"
    docker build "${arguments[@]}"
else
    echo "Neither buildah nor a Docker engine is here; one of them builds the image." >&2
    exit 1
fi
echo "Built $image of $tag"
