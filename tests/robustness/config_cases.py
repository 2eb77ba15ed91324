"""Bad configs and bad overrides."""

from __future__ import annotations

from robustness.case import TRAIN, TRAIN_MAPS, Case, cases, directory, fifo, file, link, photos, split, unix_socket

ALONE = split("train dreambooth --config bad.yaml")
FILES: dict[str, bytes | str] = {
    "empty": "",
    "a list": "- a\n- b\n",
    "text": "just text\n",
    "a number": "3\n",
    "binary": bytes(range(256)),
    "zeros": bytes(4096),
    "UTF-16": "output_dir: out\n".encode("utf-16"),
    "Latin-1": "output_dir: caf\xe9\n".encode("latin-1"),
    "an open bracket": "data: [1, 2\n",
    "an open quote": "output_dir: 'out\n",
    "a tab": "data:\n\tclass_name: toy\n",
    "two colons": "output_dir: a: b\n",
    "a key twice": "output_dir: a\noutput_dir: b\n",
    "an anchor of itself": "data: &a [*a]\n",
    "an unknown anchor": "data: *nowhere\n",
    "a tag that runs code": "output_dir: !!python/object/apply:os.mkdir [ran]\n",
    "an unknown tag": "output_dir: !mine out\n",
    "two documents": "output_dir: a\n---\noutput_dir: b\n",
    "keys that are numbers": "1: 2\n",
    "keys that are lists": "? [a, b]\n: c\n",
    "a million laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{new}: &{new} [{','.join(f'*{old}' for _ in range(9))}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=False)
    ),
    "nested a thousand times": "[" * 1000 + "]" * 1000,
    "json": '{"output_dir": "out", "data": {"class_name": 3',
    "html": "<!DOCTYPE html><html><head><title>404</title></head></html>\n",
}

UNKNOWN = (
    "training.stepz=4", "trainin.steps=3", "data.prior.num_image=3", "adapter.rank=8", "validation.prompt=[a]",
    "steps=4", "adapter.Method=ether", "training.steps.more=1", "seed.x=1", "output_dir.x=1",
    "validation.sampling.step=3", "data.more_subjects=[{instance_dir: a, class_name: b, nam: x}]",
)  # fmt: skip
OTHER_TYPES = (
    "training.steps=two", "training.steps=1.5", "training.steps=true", "training.steps=[1]", "training.steps={a: 1}",
    "training.betas=[0.9]", "training.betas=0.9", "training.betas=[a, 0.9]", "training.optimizer=sgdd", "seed=x",
    "seed=1.5", "data=3", "data.class_name=7", "data.class_name=[a]", "data.class_name=''",
    "data.horizontal_flip=maybe", "data.instance_dir=", "data.crop=centre", "output_dir=[a]", "output_dir=",
    "training=null", "validation=7", "validation.prompts=a", "validation.prompts=[a, 2]", "validation.sampling=ddim",
    "validation.sampling.scheduler=dim", "adapter=ether", "adapter=null", "adapter.method=", "adapter.method=[ether]",
    "base_model=", "base_model=[tiny]", "training.tracker=tensorbord", "training.mixed_precision=fp8",
    "quantization=int3", "data.prior=true", "data.prior={num_images: x}", "data.more_subjects=[a]",
    "allow_pickle=perhaps", "training.compile=fast",
)  # fmt: skip
FLOATS = (
    "training.learning_rate", "training.weight_decay", "training.epsilon", "training.max_grad_norm",
    "training.min_snr_gamma", "training.noise_offset", "training.ema_decay", "data.caption_dropout",
    "validation.sampling.guidance",
)  # fmt: skip
NOT_FINITE = (
    *(f"{key}={value}" for key in FLOATS for value in (".nan", ".inf")),
    "training.betas=[.nan, 0.9]",
    "data.prior={weight: .nan}",
    "data.prior={sampling: {guidance: .inf}}",
    "training.learning_rate=-.inf",
    "training.learning_rate=1e400",
    "training.steps=.inf",
    "training.steps=.nan",
    "seed=.nan",
)
OUT_OF_RANGE = (
    "training.steps=0", "training.steps=-1", "training.steps=1000000000000000000000000000000", "training.epochs=2",
    "training.steps=null", "training.batch_size=0", "training.batch_size=-4", "training.batch_size=100000000000",
    "training.gradient_accumulation=0", "training.learning_rate=-1", "training.warmup_steps=-1",
    "training.betas=[0.9, 1]", "training.betas=[-1, 0.9]", "training.weight_decay=-1", "training.epsilon=0",
    "training.max_grad_norm=0", "training.ema_decay=1", "training.ema_decay=0", "training.workers=-1",
    "training.workers=100000", "training.checkpoint_every=0", "training.keep_states=0", "training.keep_checkpoints=0",
    "training.log_every=0", "training.profile=0",
    "data.resolution=0", "data.resolution=-64", "data.resolution=63", "data.resolution=1000000000",
    "data.caption_dropout=2", "data.crops_per_photo=0", "data.bucket_factor=0", "validation.every=0",
    "validation.images_per_prompt=0", "validation.sampling.steps=0",
    "validation.sampling.guidance=-1", *(f"{key}=1e39" for key in FLOATS), "adapter.num_blocks=1000000",
)  # fmt: skip
NO_SETTING = (
    "training.steps", "=3", "words in a row", "", "training..steps=1", ".=1", "[0]=1", "a.[=1", "training.betas[9]=1",
)  # fmt: skip
YAML_HALF = (
    "data.class_name=toy #2", "data.class_name=&x y", "data.class_name=!x y", "data.class_name=*x",
    "data.class_name={a|b}", "data.class_name=? x", "data.class_name='toy", "data.class_name=[toy",
    "data.class_name=a: b: c", "data.class_name=@toy", "data.class_name=%toy", "data.class_name=`toy`",
    "data.class_name=\ttoy\x07",
)  # fmt: skip
INTERPOLATIONS = (
    "data.class_name=${nowhere}", "data.class_name=${data.class_name}", "data.class_name=${",
    "data.class_name=${oc.env:NOWHERE}", "data.class_name=${nothing:1}", "training.steps=${data.class_name}",
    "data.class_name=${data}",
)  # fmt: skip
ADAPTERS = (
    "adapter.method=ether_pluss", "adapter.target=nowhere", "adapter.target=[nowhere]", "adapter.target=[to_q(]",
    "adapter.target=[]", "adapter.target=['']", "adapter.target=re:(", "adapter.num_blocks=7", "adapter.num_blocks=0",
    "adapter.sides=left", "adapter.init_from=nowhere", "adapter.blocks_pattern={to_q: 0}",
    "adapter.blocks_pattern={'(': 2}", "adapter.sides_pattern={to_q: up}", "adapter={method: lora, rank: 0}",
    "adapter={method: lora, rank: 100000000}", "adapter={method: lora, alpha: .nan}",
    "adapter={method: magnitude, after: nowhere}", "adapter={method: controlnet}", "adapter={method: none}",
    "adapter={method: full, rank: 2}",
)  # fmt: skip
MAPS = (
    "data.dataset_dir=nowhere", "data.split=tranining", "data.condition=cany", "data.captions=nowhere",
    "data.limit=0", "data.resolution=60", "validation={split: nowhere, images: 1}", "adapter.text_encoder=true",
    "training.encoder_learning_rate=.nan", "training.max_encoder_learning_rate=0", "validation.images=-1",
    "validation.sampling.condition_start=2", "validation.sampling.condition_end=.nan",
    "validation.sampling.condition_scale=.inf",
)  # fmt: skip

CASES = [
    *(
        Case(
            "a config that is no mapping of settings", ALONE, "bad.yaml", file("bad.yaml", content), faults=0, name=name
        )
        for name, content in FILES.items()
    ),
    *(
        Case("a config that is no file", (*ALONE[:-1], name), name if len(name) < 99 else "", make, name=name[:9])
        for name, make in (
            ("missing.yaml", None),
            ("folder", directory("folder")),
            ("pipe.yaml", fifo("pipe.yaml")),
            ("socket.yaml", unix_socket("socket.yaml")),
            ("/dev/zero", None),
            ("/dev/null", None),
            ("loop.yaml", link("loop.yaml", "loop.yaml")),
            ("dangling.yaml", link("dangling.yaml", "nowhere.yaml")),
            ("x" * 300 + ".yaml", None),
            ("", None),
            ("bad.yaml/more", file("bad.yaml", "seed: 1\n")),
        )
    ),
    *cases("an unknown setting", TRAIN, UNKNOWN),
    *cases("a setting of another type", TRAIN, OTHER_TYPES, ""),
    *cases("a setting that is not finite", TRAIN, NOT_FINITE, ""),
    *cases("a setting out of range", TRAIN, OUT_OF_RANGE, ""),
    *cases("a word that is no setting", TRAIN, NO_SETTING, ""),
    *cases("an interpolation without a value", TRAIN, INTERPOLATIONS, ""),
    *cases("an adapter that cannot be attached", TRAIN, ADAPTERS, ""),
    *cases("a controllable setting that cannot be followed", (*TRAIN_MAPS, "data.dataset_dir=$SCENES"), MAPS, ""),
    Case(
        "a value that YAML would cut",
        (*TRAIN, "data.instance_dir=ph/dog #2"),
        "#2",
        photos("ph/dog"),
        name="a folder's name",
    ),
    # As plain text they are a class's name; read by halves they are nothing.
    *(Case("a value that YAML would cut", (*TRAIN, word), codes=(0, 2), name=word) for word in YAML_HALF),
]
