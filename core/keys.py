"""`python -m core.keys`: write API keys into .env at first start, and say how to call the service.

Keys are shown when they are made and never again.
"""

from __future__ import annotations

import os
import secrets as random
from pathlib import Path

from core.settings import configuration_path, load, secrets


def ensure(path: Path) -> dict[str, str]:
    """Add what is missing of API_KEY and ADMIN_API_KEY to the file at `path` (mode 0600); return what was made."""
    have = secrets()
    missing = [
        name
        for name, value in (("API_KEY", have.api_key), ("ADMIN_API_KEY", have.admin_api_key))
        if not value.get_secret_value()
    ]
    made = {name: random.token_urlsafe(24) for name in missing}
    if made:
        before = path.read_text() if path.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.fchmod(descriptor, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(before + "".join(f"{name}={value}\n" for name, value in made.items()))
    return made


def main() -> None:
    settings = load()
    address = f"http://{settings.server.host}:{settings.server.port}"
    print(f"Easel serves on {address}")
    if settings.auth.mode == "off":
        key = ""
        print("Keys are off: only this machine is served.")
    else:
        env = configuration_path().parent / ".env"
        made = ensure(env)
        for name, value in made.items():
            print(f"  {name}={value}   (new, in {env})")
        key = made.get("API_KEY") or ("$API_KEY" if os.environ.get("API_KEY") else f"$(sed -n 's/^API_KEY=//p' {env})")
        key = f'-H "X-API-Key: {key}" '
    print(f"Open {address}/studio in a browser, or try it:")
    print(f'  curl -X POST {key}"{address}/post_config?prompt=red+apple&seed=1" -o apple.png')


if __name__ == "__main__":
    main()
