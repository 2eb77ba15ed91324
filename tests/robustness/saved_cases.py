"""Damaged adapters, runs, checkpoints, bases and results."""

from __future__ import annotations

import json
import struct
from typing import Any

import torch
from safetensors.torch import load, save

from robustness.case import GENERATE, TRAIN, Case, Change, copy, directory, fifo, file, photos, png, split, together

CONFIG, WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"


def updated(**values: Any) -> Change:
    """A JSON object with other values; `...` leaves a key out."""

    def change(old: bytes) -> bytes:
        merged = {**json.loads(old), **values}
        return json.dumps({key: value for key, value in merged.items() if value is not ...}).encode()

    return change


def tensors(convert: Any) -> Change:
    """A safetensors file whose first tensor is another one; None: it is left out."""

    def change(old: bytes) -> bytes:
        found = load(old)
        first = min(found)
        value = convert(found[first])
        return save(
            {key: value if key == first else one for key, one in found.items() if key != first or value is not None}
        )

    return change


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file that is a header alone."""
    return struct.pack("<Q", len(text) if length is None else length) + text


CONFIGS: dict[str, Change] = {
    "empty": b"",
    "cut": lambda old: old[:50],
    "binary": bytes(range(256)),
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "nested": b"[" * 100_000,
    "no method": updated(peft_type=...),
    "an unknown method": updated(peft_type="ETHR"),
    "a number for the method": updated(peft_type=3),
    "a list for the method": updated(peft_type=["ETHER"]),
    "a number for the target": updated(target_modules=3),
    "a target that is no pattern": updated(target_modules="to_q("),
    "a target without layers": updated(target_modules=["nowhere"]),
    "no target": updated(target_modules=...),
    "null for the target": updated(target_modules=None),
    "numbers in the target": updated(target_modules=[1, 2]),
    "text for the blocks": updated(num_blocks="four"),
    "no blocks": updated(num_blocks=0),
    "minus one block": updated(num_blocks=-1),
    "half a block": updated(num_blocks=1.5),
    "seven blocks": updated(num_blocks=7),
    "an unknown variant": updated(variant="ether_minus"),
    "a list for the variant": updated(variant=["ether"]),
    "the other variant": updated(variant="ether"),
    "unknown sides": updated(sides="left"),
    "a list for a pattern": updated(blocks_pattern=[1]),
    "a bad pattern": updated(blocks_pattern={"(": 2}),
    "text for a pattern's value": updated(blocks_pattern={"to_q": "x"}),
    "an object for the base": updated(base_model_name_or_path={"a": 1}),
    "a number for the base": updated(base_model_name_or_path=7),
    "a base that is not there": updated(base_model_name_or_path="nowhere"),
}
FILES: dict[str, Change] = {
    "missing": None,
    "empty": b"",
    "cut": lambda old: old[:-100],
    "cut header": lambda old: old[:20],
    "zeros": bytes(2000),
    "html": b"<!DOCTYPE html><html>not found</html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a header of 2^60 bytes": header(b"{}", 2**60),
    "a header that is no JSON": header(b"{a}"),
    "a header that is a list": header(b"[]"),
    "no tensors": save({}),
    "other tensors": save({"a": torch.zeros(2)}),
    "an additional tensor": lambda old: save({**load(old), "more": torch.zeros(2)}),
    "a tensor less": tensors(lambda old: None),
    "another shape": tensors(lambda old: old[..., :-1].contiguous()),
    "no dimension": tensors(lambda old: torch.tensor(0.0)),
    "whole numbers": tensors(lambda old: old.long()),
    "truth values": tensors(lambda old: old > 0),
    "complex numbers": tensors(lambda old: old.to(torch.complex64)),
    "eight-bit floats": tensors(lambda old: old.to(torch.float8_e4m3fn)),
    "bytes": tensors(lambda old: old.to(torch.uint8)),
    "NaN": tensors(lambda old: old * torch.nan),
    "a pickle": b"PK\x03\x04" + bytes(100),
}
CHECKPOINTS: dict[str, Change] = {
    "empty": b"",
    "cut": lambda old: old[:100],
    "a list": b"[]",
    "a number": b"7",
    "null": b"null",
    "binary": bytes(range(256)),
    "another step": updated(step=5),
    "step -1": updated(step=-1),
    "text for the step": updated(step="two"),
    "another decay": lambda old: old.replace(b'"weight_decay": 0.01', b'"weight_decay": 0.91'),
    "another beta": lambda old: old.replace(b"0.999", b"0.199"),
    "no digests": updated(sha256=...),
    "a list of digests": updated(sha256=[]),
    "no settings": updated(settings=...),
    "a list of settings": updated(settings=[]),
    "a list for the optimiser": updated(optimizer_groups=7),
    "NaN for a rate": lambda old: old.replace(b'"lr": 0.006', b'"lr": NaN'),
    "another count of averaged steps": updated(averaged_steps=3),
}
RESULTS: dict[str, Change] = {
    "missing": None,
    "empty": b"",
    "cut": lambda old: old[:100],
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "binary": bytes(range(256)),
    "text for a value": lambda old: old.replace(b"0.5", b'"half"'),
    "no metrics": updated(metrics=...),
    "a list of metrics": updated(metrics=[]),
    "no counts": updated(counts={}),
    "text for a count": updated(counts={"subjects": "one"}),
    "a list for the run": updated(run=[]),
    "nested": b"[" * 100_000,
}
METRICS: dict[str, Change] = {
    "not JSON": b"step 1\n",
    "a list": b"[]\n",
    "a number": b"7\n",
    "binary": bytes(range(256)) + b"\n",
    "no step": b'{"loss": 1}\n',
    "text for a loss": b'{"step": 1, "loss": "x"}\n',
    "null for a step": b'{"step": null, "loss": 1.0}\n',
    "a list for a loss": b'{"step": 1, "loss": [1]}\n',
}
RUN_CONFIGS: dict[str, Change] = {
    "empty": b"",
    "a list": b"- a\n",
    "binary": bytes(range(256)),
    "an open bracket": b"a: [",
    "a list for data": b"base_model: tiny\ndata: [1]\nadapter: {method: ether_plus}\n",
    "a number for the base": b"base_model: 7\n",
    "a tag that runs code": b"a: !!python/object/apply:os.mkdir [ran]\n",
}
ENCODERS: dict[str, dict[str, Change]] = {
    "no weights": {"condition_encoder/diffusion_pytorch_model.safetensors": None},
    "cut weights": {"condition_encoder/diffusion_pytorch_model.safetensors": lambda old: old[:-100]},
    "other weights": {"condition_encoder/diffusion_pytorch_model.safetensors": save({"a": torch.zeros(2)})},
    "no config": {"condition_encoder/config.json": None},
    "a list for a config": {"condition_encoder/config.json": b"[]"},
    "an empty config": {"condition_encoder/config.json": b""},
    "other types in the config": {"condition_encoder/config.json": b'{"in_channels": "x"}'},
}
BASES: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "not JSON": b"{",
    "no parts": b"{}",
    "another pipeline": b'{"_class_name": "FluxPipeline", "_diffusers_version": "0.30.0"}',
    "an unknown pipeline": b'{"_class_name": "Nothing"}',
    "a number for a part": b'{"_class_name": "StableDiffusionPipeline", "unet": 3}',
    "parts that are missing": b'{"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}',
}
SINGLE: dict[str, bytes] = {
    "base.safetensors": header(b"{}", 2**60),
    "empty.safetensors": b"",
    "other.safetensors": save({"a": torch.zeros(2)}),
    "base.ckpt": b"\x80\x04\x95",
    "text.ckpt": b"text",
    "zip.ckpt": b"PK\x03\x04" + bytes(50),
    "base.bin": b"",
    "base.gguf": b"GGUF",
}
DRAW = ("--prompt", "a", *split("--steps 1 --output out"))
RESUME = split("train dreambooth --config run/config.yaml output_dir=run training.resume=true training.steps=8")
EARLIER: dict[str, Change] = {"checkpoints/step-000002": None, "checkpoints/step-000004": None}

CASES = [
    *(
        Case(
            f"a damaged adapter_config.json, {what}",
            (*command, "--adapter", "run"),
            "",
            copy("RUN", "run", {CONFIG: change}),
            name=name,
        )
        for name, change in CONFIGS.items()
        for what, command in (("inspected", ("inspect",)), ("used", ("generate", *DRAW)))
        # What only fails on a model is no fault of the file alone.
        if what == "used"
        or name
        not in (
            "seven blocks",
            "a target without layers",
            "the other variant",
            "a base that is not there",
            "a bad pattern",
            "a target that is no pattern",
            "no target",
            "null for the target",
        )
    ),
    *(
        Case(
            f"damaged weights, {what}",
            (*command, "--adapter", "run"),
            "",
            copy("RUN", "run", {WEIGHTS: change}),
            name=name,
        )
        for name, change in FILES.items()
        for what, command in (("inspected", ("inspect",)), ("used", ("generate", *DRAW)))
        if what == "used"
        or name
        not in (
            "other tensors",
            "an additional tensor",
            "a tensor less",
            "another shape",
            "no dimension",
            "no tensors",
            "NaN",
        )
    ),
    *(
        Case(
            "a damaged condition encoder",
            (*split("generate --adapter run --condition map.png"), *DRAW),
            "",
            together(copy("MAPS", "run", damage), file("map.png", png(64, 64, 3, "L"))),
            name=name,
        )
        for name, damage in ENCODERS.items()
    ),
    *(
        Case("no folder of an adapter", (*command, "--adapter", path), "", make, name=f"{command[0]} {name}")
        for command in (("inspect",), ("generate", *DRAW))
        for name, path, make in (
            ("nothing", "nowhere", None),
            ("an empty folder", "run", directory("run")),
            ("a file", "run", file("run", "a")),
            ("a pipe", "run", fifo("run")),
            ("a pipe for the config", "run", fifo("run/adapter_config.json")),
            ("a name too long", "r" * 300, None),
            ("a checkpoint that is not there", "$RUN/checkpoints/step-000099", None),
            ("photos", "ph", photos("ph")),
            (
                "a pickled adapter",
                "run",
                copy("RUN", "run", {WEIGHTS: None, "adapter/adapter_model.bin": b"\x80\x04N."}),
            ),
        )
    ),
    *(
        Case(
            "a damaged checkpoint.json",
            RESUME,
            "",
            copy("RUN", "run", {"checkpoints/step-000006/checkpoint.json": change, **EARLIER}),
            name=name,
        )
        for name, change in CHECKPOINTS.items()
    ),
    *(
        Case(
            "a damaged state of the optimiser",
            RESUME,
            "",
            copy("RUN", "run", {"checkpoints/step-000006/optimizer.safetensors": change, **EARLIER}),
            name=name,
        )
        for name, change in FILES.items()
        if name in ("missing", "empty", "cut", "zeros", "NaN")
    ),
    *(
        Case(
            "a checkpoint that is not there",
            (*RESUME, f"training.resume={value}"),
            "",
            copy("RUN", "run", {}),
            name=value,
        )
        for value in ("step-000099", "nowhere", "''", "7", "run", "[a]", "yes please")
    ),
    *(
        Case(
            "damaged results, compared",
            split("compare bad $RESULTS"),
            "bad",
            copy("RESULTS", "bad", {"results.json": change}),
            name=name,
        )
        for name, change in RESULTS.items()
    ),
    *(
        Case(
            "damaged results, reported",
            split("report bad/results.json --output out.html"),
            "bad",
            copy("RESULTS", "bad", {"results.json": change}),
            name=name,
        )
        for name, change in RESULTS.items()
    ),
    *(
        Case(
            "damaged metrics of a run",
            split("report run --output out.html"),
            "metrics.jsonl",
            copy("RUN", "run", {"metrics.jsonl": change}),
            name=name,
        )
        for name, change in METRICS.items()
    ),
    *(
        Case(
            f"a damaged config of a run, {command.split()[0]}",
            split(command),
            "config.yaml",
            copy("RUN", "run", {"config.yaml": change}),
            name=name,
        )
        for command in ("report run --output out.html", "evaluate run --output out")
        for name, change in RUN_CONFIGS.items()
    ),
    *(
        Case(
            "a base that is none",
            (*TRAIN, "base_model=base"),
            "base",
            file("base/model_index.json", content),
            name=name,
        )
        for name, content in BASES.items()
    ),
    *(
        Case(
            "a single file that is no base",
            (*split("generate --output out --prompt a --base-model"), name),
            name,
            file(name, content),
            name=name,
        )
        for name, content in SINGLE.items()
    ),
    *(
        Case("a VAE that is none", (*GENERATE, "--prompt", "a", "--vae", name), name, make, name=name)
        for name, make in (
            ("nowhere", None),
            ("vae.safetensors", file("vae.safetensors", b"")),
            ("empty", directory("empty")),
            ("vae", file("vae/config.json", b"[]")),
            ("pipe.safetensors", fifo("pipe.safetensors")),
        )
    ),
    *(
        Case(
            "a base that is not there",
            (*GENERATE[:1], *split("--output out --prompt a --base-model"), name),
            "",
            name=name or "no name",
        )
        for name in (
            "nowhere",
            "some/where",
            "",
            "a/b/c",
            "../nowhere",
            "http://nowhere",
            "x" * 300,
            "/dev/zero",
            "tyny",
        )
    ),
]
