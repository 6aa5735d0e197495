"""The raw loop: reads lines of JSON, each a list of pictures, draws them one after another with diffusers alone, and
answers the seconds that each took, from the call to the PNG, and the PNGs."""

from __future__ import annotations

import base64
import json
import os
import sys
import time

from drawing import Drawing, png


def main() -> None:
    pipe_out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not belong into the answers
    drawing = Drawing.configured()
    print("{}", file=pipe_out, flush=True)  # ready
    for line in sys.stdin:
        took, pictures = [], []
        for wanted in json.loads(line):
            began = time.perf_counter()
            picture = png(drawing.draw([wanted])[0])
            took.append(time.perf_counter() - began)
            pictures.append(base64.b64encode(picture).decode())
        print(json.dumps({"took": took, "pictures": pictures}), file=pipe_out, flush=True)


if __name__ == "__main__":
    main()
