"""The image's health check: exit 0 where /readyz says ready."""

import os
import sys
import urllib.error
import urllib.request

port = os.environ.get("PORT") or os.environ.get("BENTOML_PORT") or os.environ.get("EASEL_SERVER__PORT") or "3000"
try:
    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=8)
except (urllib.error.URLError, OSError) as error:
    sys.exit(f"not ready: {error}")
