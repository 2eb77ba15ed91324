"""Bodies that a server of images refuses, each with the parameter that its answer names."""

from __future__ import annotations

from typing import Any

FAULTS: dict[str, tuple[Any, str | None]] = {
    "not JSON": (b"{", None),
    "another value": (b"[1]", None),
    "too deep": (b"[" * 10_000, None),
    "not UTF-8": (b'{"prompt": "\xff"}', None),
    "half a character": (b'{"prompt": "\\ud800"}', None),
    "no prompt": ({}, "prompt"),
    "a prompt that is a number": ({"prompt": 5}, "prompt"),
    "a long prompt": ({"prompt": "x" * 32_001}, "prompt"),
    "a number in words": ({"prompt": "a", "n": "2"}, "n"),
    "no images": ({"prompt": "a", "n": 0}, "n"),
    "too many images": ({"prompt": "a", "n": 11}, "n"),
    "true for a number": ({"prompt": "a", "n": True}, "n"),
    "a negative size": ({"prompt": "a", "size": "-64x64"}, "size"),
    "a size of zero": ({"prompt": "a", "size": "0x64"}, "size"),
    "a size of other digits": ({"prompt": "a", "size": "٦٤x٦٤"}, "size"),
    "an odd size": ({"prompt": "a", "size": "65x64"}, "size"),
    "a large size": ({"prompt": "a", "size": "128x64"}, "size"),
    "a size in numbers": ({"prompt": "a", "size": 64}, "size"),
    "too many steps": ({"prompt": "a", "num_inference_steps": 101}, "num_inference_steps"),
    "no steps": ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps"),
    "a step too few": ({"prompt": "a", "num_inference_steps": 1, "scheduler": "pndm"}, "num_inference_steps"),
    "a seed that is no number": (b'{"prompt": "a", "seed": NaN}', "seed"),
    "a large seed": (b'{"prompt": "a", "seed": 1' + b"0" * 3000 + b"}", "seed"),
    "guidance without a bound": (b'{"prompt": "a", "guidance_scale": Infinity}', "guidance_scale"),
    "an unknown sampler": ({"prompt": "a", "scheduler": "dpm"}, "scheduler"),
    "a link for an answer": ({"prompt": "a", "response_format": "url"}, "response_format"),
    "another format": ({"prompt": "a", "output_format": "webp"}, "output_format"),
    "a stream": ({"prompt": "a", "stream": True}, "stream"),
    "a typo": ({"prompt": "a", "sead": 3}, "sead"),
    "an unknown adapter": ({"prompt": "a", "model": "dog"}, "model"),
    "a path": ({"prompt": "a", "model": "../adapters/robot"}, "model"),
    "a path of another system": ({"prompt": "a", "model": "..\\robot"}, "model"),
    "a whole path": ({"prompt": "a", "model": "/etc"}, "model"),
    "this folder": ({"prompt": "a", "model": "."}, "model"),
    "a NUL": ({"prompt": "a", "model": "robot\0"}, "model"),
    "a long name": ({"prompt": "a", "model": "x" * 500}, "model"),
    "no name": ({"prompt": "a", "model": ""}, "model"),
    "a file": ({"prompt": "a", "model": "file"}, "model"),
    "a folder without an adapter": ({"prompt": "a", "model": "empty"}, "model"),
    "an adapter of another base": ({"prompt": "a", "model": "other"}, "model"),
}
"""Those with `model` get 404, the others 400. The server has no adapters `dog`, `empty`, `file` and `other`."""
