"""LitServe with its batching: up to eight requests that come within 10 ms; those of a batch that are alike are drawn at once."""

from __future__ import annotations

import sys
from typing import Any

import litserve
from drawing import Drawing, alike, png
from fastapi import Response


class Txt2Img(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.drawing = Drawing.configured()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe would have FastAPI parse by the annotation
        return request

    def batch(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return inputs

    def predict(self, inputs: list[dict[str, Any]]) -> list[bytes]:
        drawn: dict[int, bytes] = {}
        groups: dict[str, list[int]] = {}
        for i, wanted in enumerate(inputs):
            groups.setdefault(alike(wanted), []).append(i)
        for group in groups.values():
            for i, image in zip(group, self.drawing.draw([inputs[i] for i in group]), strict=True):
                drawn[i] = png(image)
        return [drawn[i] for i in range(len(inputs))]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="image/png")


if __name__ == "__main__":
    api = Txt2Img(max_batch_size=8, batch_timeout=0.01)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=600).run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
