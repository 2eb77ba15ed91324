"""Bad options, output folders and machines: of generate, evaluate, score, benchmarks, reports and analyses."""

from __future__ import annotations

from robustness.case import (
    GENERATE,
    GENERATE_MAPS,
    TRAIN,
    Case,
    Make,
    copy,
    directory,
    fifo,
    file,
    link,
    mode,
    photos,
    png,
    split,
    together,
)

GENERATE_RUN = split("generate --adapter $RUN --steps 1 --output out --prompt a")
NUMBERS = (
    "--scale nan", "--scale inf", "--scale -inf", "--scale x", "--guidance nan", "--guidance inf", "--guidance -1",
    "--guidance x", "--steps 0", "--steps -1", "--steps x", "--steps 2000 --scheduler ddim", "--steps 100000",
    "--scheduler pndm", "--scheduler ddimm", "--num-images 0", "--num-images -1", "--num-images 1.5",
    "--num-images 99999999999999", "--seed x", "--seed 1.5", "--resolution 0", "--resolution 63", "--resolution -64",
    "--resolution 1000000000", "--batch-size 0", "--batch-size x", "--dtype fp8", "--offload disk",
    "--quantization int3", "--resolution 64.5",
)  # fmt: skip
DEVICES = (
    "gpu", "cuda", "cuda:99", "mps", "cpu:x", "", "meta", "cuda:-1", "xla",
)  # fmt: skip
MISUSE = (
    "", "--nothing", "generat", "generate --output out", "generate --prompt a --output out", "train", "train nothing",
    "train dreambooth", "inspect", "inspect a b", "score", "compare",
    "report $RUN", "report --output a.html", "generate --prompt a --prompts b --output out --base-model tiny",
    "benchmark", "grid", "analyze", "analyze nothing", "evaluate", "data", "--config x", "generate --output",
    "generate --base-model tiny --output out --prompt a extra",
)  # fmt: skip
CONDITION_MISUSE = (
    "--prompt a", "--condition map.png", "--dataset $SCENES --prompt a", "--dataset nowhere",
    "--dataset $SCENES --split nowhere", "--dataset $SCENES --height 64", "--condition map.png --prompt a --limit 2",
    "--condition map.png --prompt a --split x", "--condition map.png --prompt a --resolution 64 --height 64",
    "--condition map.png --prompt a --preprocessor cany", "--condition map.png --prompt a --condition-scale nan",
    "--condition map.png --prompt a --condition-start 2",
    "--condition map.png --prompt a --condition-start 0.5 --condition-end 0.5",
    "--condition map.png --prompt a --height 63", "--condition map.png --prompt a --condition-end nan",
    "--condition map.png --prompt a --height 1000000000", "--dataset $SCENES --limit 0",
    "--dataset $SCENES --captions nowhere", "--dataset $SCENES --condition map.png",
)  # fmt: skip
SCORE = (
    "score nowhere", "score $RUN --protocol nowhere", "score $RUN --protocol s2i/csail-v1",
    "score $MAPS --protocol tinyworld/dreambooth-v1", "score $RUN --images out",
    "score --images nowhere --real builtin:", "score --images empty --real builtin:", "score --images empty",
    "score --images empty --real builtin: --dataset $SCENES", "score --ceilings", "score --ceilings --real nowhere",
    "score --ceilings --real empty", "score $RUN --scorer nothing=x", "score $RUN --scorer backbone",
    "score $RUN --scorer backbone=nowhere", "score $RUN --device gpu", "score $RUN $RUN",
    "score $RUN --all-checkpoints $RUN", "score $RUN --dataset $SCENES", "score $MAPS --real builtin:",
    "score $MAPS --dataset nowhere", "score $RUN --batch-size 0", "score $RUN --protocol bad.yaml",
    "score $RUN --protocol /dev/zero", "score $RUN --protocol empty",
    "score --images pics --dataset $SCENES --protocol tinyworld/s2i-v1", "score $RUN --real nowhere",
    "score $RUN --real empty", "score empty", "score bad.yaml", "score pipe", "score $RUN --protocol pipe",
)  # fmt: skip
PROTOCOLS: dict[str, str | bytes] = {
    "empty": "",
    "a list": "- a\n",
    "binary": bytes(range(256)),
    "no scorers": "name: a\nsubjects: {}\n",
    "a tag that runs code": "name: !!python/object/apply:os.mkdir [ran]\n",
    "other types": "name: 3\njudges: x\nsubjects: [1]\n",
    "NaN": "name: a\nsampling: {guidance: .nan}\n",
}
TINY = "benchmark --config benchmark/tinyworld output_dir=out"
BENCHMARK = (
    "dreambooth.protocol=nowhere", "dreambooth.dataset_dir=nowhere",
    "dreambooth.methods={../x: {config: quickstart/dreambooth}}", "dreambooth.methods={a: {config: nowhere}}",
    "dreambooth.methods={a: {config: configs}}",
    "dreambooth.methods={a: {config: quickstart/dreambooth, settings: [training.stepz=1]}}",
    "dreambooth.subjects=[nobody]", "dreambooth.checkpoint=7", "dreambooth.judges={nothing: x}",
    "dreambooth.judges={backbone: nowhere}", "device=gpu", "device=cuda:99", "threads=0", "dreambooth.batch_size=0",
    "controllable=null dreambooth=null", "dreambooth.settings=[output_dir=x]", "dreambooth.also_checkpoints=[0]",
    "dreambooth.methods={a: {config: quickstart/dreambooth, settings: [training.mixed_precision=fp8]}}",
    "--shard 0/3", "--shard 4/3", "--shard x", "--workers 0", "--retries 0", "--executor slurm",
    "dreambooth.subjects=[]",
    "dreambooth.methods={a: {config: quickstart/dreambooth, settings: [data.prior={class_dir: nowhere}]}}",
    "dreambooth.methods={a: {config: quickstart/dreambooth, settings: [adapter.target=nowhere]}}",
)  # fmt: skip
GRID = (
     "dreambooth.grid.axes={training.stepz: [1]}",
    "dreambooth.grid.axes={training.steps: []}", "dreambooth.grid.axes={training.learning_rate: [.nan]}",
    "dreambooth.grid.axes={training.steps: [x]}", "dreambooth.grid.metrics=[nothing]", "dreambooth.grid.seeds=0",
    "dreambooth.grid.axes=3", "dreambooth.protocol=nowhere",
)  # fmt: skip
ANALYZE = (
    "analyze cost nothing", "analyze cost unet --latents 7", "analyze cost --latents 0", "analyze cost --tokens x",
    "analyze geometry nowhere", "analyze geometry $MAPS nowhere", "analyze geometry $RUN --device gpu",
    "analyze geometry empty", "analyze energy $RUN --chunk 0", "analyze energy nowhere", "analyze energy empty",
    "analyze energy $RUN/adapter", "analyze energy $RUN --device cuda:99", "analyze perturbation --base-model other",
    "analyze perturbation --methods lora", "analyze perturbation --distances nan",
    "analyze perturbation --distances inf", "analyze perturbation --distances -1",
    "analyze perturbation --distances x", "analyze perturbation --count -1",
    "analyze perturbation --count 99999999999", "analyze perturbation --draws 0",
    "analyze perturbation --num-blocks 7", "analyze perturbation --target nowhere", "analyze perturbation --steps 0",
    "analyze perturbation --guidance nan", "analyze perturbation --device gpu",
    "analyze perturbation --prompts nowhere", "analyze perturbation --prompts empty",
    "analyze perturbation --steps 100000", "analyze perturbation --guidance inf",
    "analyze perturbation --batch-size -1",
)  # fmt: skip
REPORT = (
    "report nowhere --output o.html", "report $RUN --output o.pdf", "report $RUN --output o",
    "report empty --output o.html", "report $RUN --output empty", "report $RUN --output bad.yaml/o.html",
    "report bad.yaml --output o.html", "report pipe --output o.html",
    "report $RESULTS/results.json nowhere --output o.html", "compare nowhere $RESULTS", "compare empty $RESULTS",
    "compare pipe $RESULTS", "compare /dev/zero", "compare bad.yaml", "compare $RUN $RESULTS",
    "report /dev/zero --output o.html",
)  # fmt: skip
EVALUATE = (
    "evaluate nowhere", "evaluate empty", "evaluate $RUN --num-images 0", "evaluate $RUN --seed x",
    "evaluate $MAPS --num-images 2 --output out", "evaluate bad.yaml", "evaluate pipe",
    "evaluate $RUN --output bad.yaml", "evaluate $RUN --num-images 99999999999999 --output out",
    "evaluate $RUN/adapter/adapter_config.json",
)  # fmt: skip
REQUESTS = (
    "--requests nowhere", "--requests empty", "--requests pipe", "--requests /dev/zero", "--requests bad.yaml",
    "--requests map.png", "--requests ok.jsonl --prompt a", "--requests ok.jsonl --shelf nowhere",
    "--requests ok.jsonl --shelf pipe", "--requests ok.jsonl --shelf /dev/zero", "--requests ok.jsonl --shelf empty",
    "--requests ok.jsonl --shelf map.png", "--requests ok.jsonl --adapter $RUN", "--requests ok.jsonl --merge",
    "--requests ok.jsonl", "--requests ok.jsonl --base-model tiny", "--shelf map.png --prompt a",
)  # fmt: skip
SHELF = (
    "shelf", "shelf nothing", "shelf build", "shelf build s", "shelf build s nowhere", "shelf build s empty",
    "shelf build s pipe", "shelf build s $MAPS", "shelf build s a=$RUN a=$RUN", "shelf build s =$RUN",
    "shelf build map.png $RUN", "shelf build pipe $RUN", "shelf build empty $RUN", "shelf build s $RUN bad.yaml",
    "shelf list nowhere", "shelf list empty", "shelf list pipe", "shelf list /dev/zero", "shelf list map.png",
    "shelf list $RUN/adapter/adapter_model.safetensors", "shelf add map.png $RUN", "shelf add nowhere $RUN",
    "shelf remove map.png a", "shelf remove $RUN/adapter/adapter_model.safetensors a",
)  # fmt: skip
OUTPUTS: dict[str, tuple[str, Make | None]] = {
    "a file": ("o", file("o", "mine")),
    "under a file": ("o/in", file("o", "mine")),
    "a device": ("/dev/null", None),
    "a pipe": ("o", fifo("o")),
    "a link to itself": ("o", link("o", "o")),
    "a name too long": ("o" * 300, None),
    "a system's folder": ("/proc/nowhere", None),
    "no permission": ("ro/o", together(directory("ro"), mode("ro", 0o500))),
    "a folder without permission": ("ro", together(directory("ro"), mode("ro", 0o500))),
}
WRITERS = {
    "train": (*TRAIN, "output_dir={}"),
    "generate": split("generate --base-model tiny --steps 1 --prompt a --output {}"),
    "evaluate": split("evaluate $RUN --num-images 1 --output {}"),
    "geometry": split("analyze geometry $RUN --output {}"),
    "score": split("score --ceilings --real builtin: --protocol tinyworld/dreambooth-v1 --output {}"),
    "benchmark": (*split("benchmark --config benchmark/tinyworld"), "output_dir={}"),
}
FILES_OUT = {
    "report": (split("report $RESULTS/results.json --output {}"), ".html"),
    "sheet": (split("data check $SCENES --sheet {}"), ".png"),
    "shelf": (split("shelf build {} $RUN"), ".safetensors"),
}
MINE: dict[str, tuple[tuple[str, ...], Make]] = {
    "a picture of the same name": (
        (*GENERATE, "--prompt", "a"),
        file("out/00-a-c93f52-00.png", png()),
    ),
    "a grid": ((*GENERATE, "--prompt", "a"), file("out/grid.png", png())),
    "a list of images": ((*GENERATE, "--prompt", "a"), file("out/images.jsonl", "mine\n")),
    "a report": (split("report $RESULTS/results.json --output mine.html"), file("mine.html", "mine")),
    "a table": (split("report $RESULTS/results.json --output mine.csv"), file("mine.csv", "mine")),
    "scores": (split("evaluate $RUN --num-images 1 --output out"), file("out/scores.json", "mine")),
    "a sheet": (split("data check $SCENES --sheet mine.png"), file("mine.png", png())),
    "results": (
        split("score --ceilings --real builtin: --protocol tinyworld/dreambooth-v1 --output out"),
        file("out/ceilings.json", "mine"),
    ),
    "a table of distances": (split("analyze geometry $RUN --output out"), file("out/geometry.csv", "mine")),
    "a run folder": (TRAIN, file("out/config.yaml", "mine: 1\n")),
    "metrics": (TRAIN, file("out/metrics.jsonl", "mine\n")),
}
SOME = together(
    directory("empty"),
    file("bad.yaml", "a: [1\n"),
    fifo("pipe"),
    photos("pics"),
    file("map.png", png(64, 64, 3, "L")),
    file("ok.jsonl", '{"adapter": "nowhere", "prompt": "a"}\n'),
)
SMALL = (*TRAIN, "base_model=tiny")

CASES = [
    *(Case("a number out of range", (*GENERATE_RUN, *split(options)), "", name=options) for options in NUMBERS),
    *(Case("no such device", (*GENERATE_RUN, "--device", name), "device", name=name or "no name") for name in DEVICES),
    *(
        Case("a misused command", split(words), "", codes=(0,) if not words else (2,), name=words or "no word")
        for words in MISUSE
    ),
    *(
        Case("a misused condition", (*GENERATE_MAPS, *split(options)), "", SOME, name=options)
        for options in CONDITION_MISUSE
    ),
    *(Case("a score of nothing", split(command), "", SOME, name=command) for command in SCORE),
    *(
        Case(
            "a bad protocol",
            split("score $RUN --protocol mine.yaml"),
            "mine.yaml",
            file("mine.yaml", content),
            faults=0,
            name=name,
        )
        for name, content in PROTOCOLS.items()
    ),
    *(
        Case(
            "a benchmark that cannot start",
            (*split(TINY), *(split(value) if value[0] in "-c" else [value])),
            "",
            name=value,
        )
        for value in BENCHMARK
    ),
    *(
        Case(
            "a grid that cannot start",
            (*split("grid --config benchmark/rates_tinyworld output_dir=out"), value),
            "",
            name=value,
        )
        for value in GRID
    ),
    *(
        Case("faulty requests", (*split("generate --output out"), *split(words)), "", SOME, name=words)
        for words in REQUESTS
    ),
    *(Case("a shelf of nothing", split(command), "", SOME, name=command) for command in SHELF),
    *(Case("an analysis of nothing", split(command), "", SOME, name=command) for command in ANALYZE),
    *(Case("a report of nothing", split(command), "", SOME, name=command) for command in REPORT),
    *(Case("an evaluation of nothing", split(command), "", SOME, name=command) for command in EVALUATE),
    *(
        Case(
            f"an output folder that is none, {name}",
            tuple(word.replace("{}", path) for word in command),
            "",
            make,
            limits={"PRIVILEGES": 0},
            name=what,
        )
        for name, command in WRITERS.items()
        for what, (path, make) in OUTPUTS.items()
    ),
    *(
        Case(
            f"an output file that is none, {name}",
            tuple(word.replace("{}", path) for word in command),
            "",
            make,
            limits={"PRIVILEGES": 0},
            name=what,
        )
        for name, (command, suffix) in FILES_OUT.items()
        for what, path, make in (
            ("a folder", f"o{suffix}", directory(f"o{suffix}")),
            ("under a file", f"o/in{suffix}", file("o", "mine")),
            ("a name too long", "o" * 300 + suffix, None),
            ("no permission", f"ro/o{suffix}", together(directory("ro"), mode("ro", 0o500))),
            ("a link to itself", f"o{suffix}", link(f"o{suffix}", f"o{suffix}")),
        )
    ),
    *(Case("a user's file in the way", command, "", make, name=name) for name, (command, make) in MINE.items()),
    *(
        Case(
            f"a file too large for the disk, {name}",
            command,
            "",
            make,
            writes=True,
            limits={"FSIZE": size},
            name=str(size),
        )
        for name, command, make in (
            ("train", SMALL, None),
            ("cached latents", (*SMALL, "data.crop=center", "data.cache=true"), None),
            ("generate", GENERATE_RUN, None),
            ("evaluate", split("evaluate $RUN --num-images 1 --output out"), None),
            ("report", split("report $RESULTS/results.json --output o.html"), None),
            ("geometry", split("analyze geometry $RUN --output out"), None),
            ("scenes", split("train controllable --config quickstart/controllable output_dir=out"), None),
        )
        for size in (0, 100)
    ),
    *(
        Case(
            "a machine with too little",
            command,
            "",
            limits=limits,
            environment=environment,
            codes=codes,
            writes=True,
            name=name,
        )
        for name, command, limits, environment, codes in (
            (
                "no home",
                (*SMALL, "data.cache=true", "data.crop=center"),
                {},
                {"HOME": None, "XDG_CACHE_HOME": None},
                (0, 2),
            ),
            (
                "a home that is a file",
                (*SMALL, "data.cache=true", "data.crop=center"),
                {},
                {"HOME": "/dev/null", "XDG_CACHE_HOME": None},
                (2,),
            ),
            (
                "a cache that is a file",
                (*SMALL, "data.cache=true", "data.crop=center"),
                {},
                {"XDG_CACHE_HOME": "/dev/null"},
                (2,),
            ),
            ("no temporary folder", SMALL, {}, {"TMPDIR": "/nowhere"}, (0, 2)),
            ("few open files", SMALL, {"NOFILE": 8}, {}, (2,)),
            (
                "little memory",
                (*SMALL, "data.resolution=2048", "training.batch_size=8"),
                {"MEMORY": 1 << 30},
                {},
                (1, 2),
            ),
            ("little memory to generate", (*GENERATE_RUN, "--resolution", "2048"), {"MEMORY": 1 << 30}, {}, (1, 2)),
            (
                "a plain locale",
                (*TRAIN, "data.instance_dir=caf\udcc3\udca9"),
                {},
                {"LC_ALL": "C", "PYTHONUTF8": "0"},
                (2,),
            ),
        )
    ),
    *(
        Case(
            "a second phase after nothing",
            (*TRAIN, f"adapter={{method: magnitude, after: '{path}', target: null}}"),
            "",
            make,
            name=name,
        )
        for name, path, make in (
            ("nothing", "nowhere", None),
            ("a file", "bad.yaml", SOME),
            ("an empty folder", "empty", SOME),
            ("a controllable run", "$MAPS", None),
            ("damaged weights", "run", copy("RUN", "run", {"adapter/adapter_model.safetensors": lambda old: old[:-9]})),
            ("a pipe", "pipe", SOME),
        )
    ),
    *(
        Case("a start from nothing", (*TRAIN, f"adapter.init_from={path}"), "", make, name=name)
        for name, path, make in (
            ("nothing", "nowhere", None),
            ("a file", "bad.yaml", SOME),
            ("an empty folder", "empty", SOME),
            ("other layers", "$RUN", None),
            ("a pipe", "pipe", SOME),
            ("a number", "7", None),
        )
    ),
]
