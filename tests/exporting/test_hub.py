"""Publishing on the hub, and loading from it: against a stand-in that answers huggingface_hub's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from safetensors.torch import load_file

import ether_diffusion
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.errors import Notice, UserError
from ether_diffusion.exporting.hub_folder import write_hub_folder
from ether_diffusion.files import digest_of_file
from ether_diffusion.generation import load_pipeline
from ether_diffusion.models.bases import load_base
from ether_diffusion.training import dreambooth, run_task
from ether_diffusion_cli.main import main
from support.adapted_unets import move, settings_of
from support.hub_server import Hub, serve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, in the place of the hub, for Alice, who may write."""
    with serve() as hub:
        _use(monkeypatch, hub.endpoint, tmp_path)
        yield hub


def _use(monkeypatch: pytest.MonkeyPatch, endpoint: str, tmp_path: Path) -> None:
    # The client reads these variables of the environment when it is imported.
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.chdir(tmp_path)


def push(run: Path, *options: str, repo: str = "alice/robot") -> int:
    return main(["push", "--adapter", str(run), "--repo", repo, "--output", "published", *options])


def save(method: str, folder: Path, base: str = "tiny") -> Path:
    """An adapter for the miniature, whatever its base is called."""
    unet = load_base("tiny").unet
    attach(unet, settings_of(method, target=r"mid_block.*\.to_[qk]"))
    move(unet)
    return ether_diffusion.save_adapter(unet, folder, base_model=base)


def front_matter(card: bytes | str) -> dict[str, Any]:
    text = card.decode("utf-8") if isinstance(card, bytes) else card
    return yaml.safe_load(text.split("---\n")[1])


def test_a_run_is_pushed_and_loaded_by_its_name(
    finished_run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(finished_run) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.endpoint}/alice/robot"
    repository = hub.repositories["alice/robot"]
    assert repository.messages == ["made by a test", "Push ETHER+ adapter for tiny"]  # one commit
    assert {path.relative_to("published").as_posix() for path in Path("published").rglob("*") if path.is_file()} == {
        *repository.files.keys() - {".gitattributes"},
        ".ether_diffusion",
        "samples/.ether_diffusion",
    }
    facts = front_matter(repository.files["README.md"])
    assert facts["instance_prompt"] == "a photo of qwe toy"
    assert facts["widget"] == [{"text": "a qwe toy", "output": {"url": "samples/grid.png"}}]
    assert (facts["license"], facts["library_name"]) == ("apache-2.0", "diffusers")
    assert {"ether", "lora", "template:sd-lora"} <= set(facts["tags"])
    assert "base_model" not in facts  # the miniature is not on the hub
    assert str(finished_run) not in repository.files["config.yaml"].decode()

    # By name: the same adapter, in a model, in a pipeline, and as a file of other programs.
    mine = read_adapter(finished_run)
    loaded = ether_diffusion.load_adapter(load_base("tiny").unet, "alice/robot")
    assert loaded.digest == mine.digest
    assert load_pipeline("alice/robot", device="cpu")[1].digest == mine.digest  # pyright: ignore
    assert main(["export", "alice/robot", "--output", "again.safetensors"]) == 0
    assert main(["inspect", "alice/robot"]) == 0
    assert mine.digest in capsys.readouterr().out
    again, pushed = load_file("again.safetensors"), load_file("published/robot.safetensors")
    assert again.keys() == pushed.keys()
    assert all(bool((again[key] == pushed[key]).all()) for key in again)


def test_images_are_not_written_into_the_hubs_cache(finished_run: Path, hub: Hub, tmp_path: Path) -> None:
    assert push(finished_run) == 0
    words = ["--prompt", "a qwe toy", "--steps", "1", "--device", "cpu"]
    assert main(["generate", "--adapter", "alice/robot", *words]) == 0
    assert len(list((tmp_path / "images/a-qwe-toy").glob("00-*.png"))) == 1


def test_a_revision_is_named_after_an_at_sign(hub: Hub, tmp_path: Path) -> None:
    for method in ("ether", "ether_plus"):
        assert push(save(method, tmp_path / method)) == 0
    first, second = (sha for sha, _ in hub.repositories["alice/robot"].commits[1:])
    for revision, variant in ((f"@{first}", "ether"), (f"@{second}", "ether_plus"), ("", "ether_plus")):
        found = ether_diffusion.load_adapter(load_base("tiny").unet, f"alice/robot{revision}")
        assert found.digest == read_adapter(tmp_path / variant).digest


def test_what_an_earlier_push_left_is_not_loaded_with_the_new_files(finished_run: Path, hub: Hub) -> None:
    assert push(finished_run) == 0
    repository = hub.repositories["alice/robot"]
    repository.commit({**repository.files, "before/adapter_config.json": b"{}", "mine.txt": b"mine"}, "by hand")
    assert push(finished_run) == 0
    assert "before/adapter_config.json" not in repository.files
    assert repository.files["mine.txt"] == b"mine"


def test_generated_images_are_the_samples(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("adapter", "config.yaml", "samples"):
        (run / name).symlink_to(finished_run / name)
    words = ["--adapter", str(run), "--steps", "1", "--num-images", "2", "--device", "cpu"]
    (tmp_path / "prompts.txt").write_text('a qwe toy: "red" # 1\na qwe toy at night\n')
    assert main(["generate", *words, "--prompts", str(tmp_path / "prompts.txt"), "--compare"]) == 0
    assert main(["generate", *words, "--prompt", "a qwe toy", "--scale", "0.5", "--output", str(run / "images/h")]) == 0
    folder = write_hub_folder(run, "alice/robot", tmp_path / "published")
    widget = front_matter((folder.path / "README.md").read_text())["widget"]
    assert [entry["text"] for entry in widget[:2]] == ['a qwe toy: "red" # 1', "a qwe toy at night"]
    assert len(widget) == 4  # neither the base's nor those at another strength
    first = next((run / "images/prompts").glob("00-*.png"))
    assert digest_of_file(folder.path / widget[0]["output"]["url"]) == digest_of_file(first)
    assert not [note for note in folder.notes if "sample" in note]


def test_a_dry_run_writes_the_folder_alone_and_nothing_of_others(
    finished_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(finished_run, "--dry-run") == 0
    assert hub.requests == []
    content = {path: path.read_bytes() for path in Path("published").rglob("*") if path.is_file()}
    assert push(finished_run, "--dry-run") == 0  # ours are replaced
    assert {path: path.read_bytes() for path in Path("published").rglob("*") if path.is_file()} == content
    Path("published/README.md").write_text("my own words")
    capsys.readouterr()
    assert push(finished_run) == 2
    assert "published/README.md was not written by this program, or was changed since" in capsys.readouterr().err
    assert Path("published/README.md").read_text() == "my own words"
    assert "alice/robot" not in hub.repositories


def test_private_and_licence(finished_run: Path, hub: Hub) -> None:
    assert push(finished_run, "--private", "--license", "cc-by-4.0") == 0
    assert hub.repositories["alice/robot"].private
    assert front_matter(hub.repositories["alice/robot"].files["README.md"])["license"] == "cc-by-4.0"


def test_a_method_of_full_rank_is_pushed_without_a_lora_file(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(save("naive", tmp_path / "naive"), repo="alice/naive") == 0
    assert "note: no LoRA file for other programs: " in capsys.readouterr().out
    files = hub.repositories["alice/naive"].files
    assert "naive.safetensors" not in files
    assert front_matter(files["README.md"])["library_name"] == "peft"


BASES = ["someone/a base", "a: b # c", "quotes \"and\" 'single'", "back\\slash", "- list", "über/ß", "x/y: &z *a", "~"]


@pytest.mark.parametrize(
    "base", [pytest.param(base, marks=() if base == BASES[1] else pytest.mark.slow) for base in BASES]
)
def test_the_front_matter_is_valid_for_any_base(base: str, hub: Hub, tmp_path: Path, monkeypatch: Any) -> None:
    save("ether", tmp_path / "saved", base)
    assert front_matter((tmp_path / "saved/README.md").read_text())["base_model"] == base
    assert push(tmp_path / "saved", "--base", "tiny") == 0
    assert "base_model" not in front_matter(hub.repositories["alice/robot"].files["README.md"])


def test_a_base_of_the_hub_is_named(hub: Hub, tmp_path: Path) -> None:
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    save("ether", tmp_path / "saved", name)
    assert push(tmp_path / "saved", "--base", "tiny") == 0
    facts = front_matter(hub.repositories["alice/robot"].files["README.md"])
    assert (facts["base_model"], facts["base_model_relation"]) == (name, "adapter")
    assert facts["license"] == "creativeml-openrail-m"


def no_token(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")


def reading_token(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")


def others_repository(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    hub.make("alice/robot", {"README.md": b"# mine", "model.safetensors": b""})


def no_server(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def offline(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (no_token, "no token for the hub here. Set HF_TOKEN, or run `hf auth login`."),
        (wrong_token, "the hub does not accept the token (401). Set another HF_TOKEN, or run `hf auth login`."),
        (reading_token, "the hub refuses (403): this token may not do that. Take one with the right to write there."),
        (others_repository, "exists on the hub, and holds files that this program did not push, such as README.md. "),
        (no_server, "http://127.0.0.1:9 cannot be reached (ConnectError). Check the connection."),
        (offline, "HF_HUB_OFFLINE is set"),
    ],
)
def test_each_failure_is_one_line(
    fault: Any,
    message: str,
    finished_run: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fault(monkeypatch, hub)
    before = {name: list(repository.commits) for name, repository in hub.repositories.items()}
    assert push(finished_run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ether-diffusion: alice/robot")
    assert message in line
    assert {name: list(repository.commits) for name, repository in hub.repositories.items()} == before


@pytest.mark.parametrize("name", ["robot", "a/b/c", "alice/my robot", "alice/", ".x/y"])
def test_a_name_that_no_repository_can_have_is_refused(
    name: str, finished_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert push(finished_run, repo=name) == 2
    assert "expected USER/NAME" in capsys.readouterr().err
    assert hub.requests == []


def test_what_is_not_on_the_hub_is_one_line(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.make("alice/photos", {"README.md": b"", "photo.png": b""})
    hub.make("alice/secret", {"adapter_config.json": b"{}"}, private=True)
    (tmp_path / "runs").mkdir()
    for name, message in (
        ("alice/nothing", "no such folder here; on the hub: no such repository on the hub, or a private one"),
        ("alice/photos@v9", "the hub has the repository, but no such revision"),
        ("alice/photos", "the repository holds no adapter_config.json; expected an adapter"),
        ("runs/typo", "is not a folder; expected a run folder"),  # and the hub is not asked
    ):
        assert main(["generate", "--adapter", name, "--prompt", "x"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert not [request for request in hub.requests if "typo" in request]


SHORT = ("training.steps=1", "data.prior=null", "training.batch_size=1")


def test_a_training_publishes_what_it_trained(
    make_config: Any, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dreambooth.run(make_config(tmp_path / "run", *SHORT, "push_to_hub=alice/robot", "hub_private=true"))
    assert capsys.readouterr().out.splitlines()[-1] == f"Hub:     {hub.endpoint}/alice/robot"
    assert hub.repositories["alice/robot"].private
    trained = read_adapter(tmp_path / "run")
    assert ether_diffusion.load_adapter(load_base("tiny").unet, "alice/robot").digest == trained.digest


def test_a_training_that_could_not_publish_ends_before_its_first_step(
    make_config: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading_token(monkeypatch, hub)
    others_repository(monkeypatch, hub)
    with pytest.raises(UserError, match="holds files that this program did not push"):
        dreambooth.run(make_config(tmp_path / "run", *SHORT, "push_to_hub=alice/robot"))
    assert not (tmp_path / "run/checkpoints").exists()
    for wrong in ("push_to_hub=robot", "push_to_hub=alice/robot adapter={method: full}"):
        with pytest.raises(UserError, match="push_to_hub"):
            make_config(tmp_path / "run", *SHORT, *wrong.split(" ", 1))


def test_a_push_that_fails_after_training_leaves_the_adapter_and_a_command(
    make_config: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_task, "check_can_push", lambda repository: reading_token(monkeypatch, hub))
    with pytest.raises(UserError) as caught:
        dreambooth.run(make_config(tmp_path / "run", *SHORT, "push_to_hub=alice/robot"))
    (line,) = str(caught.value).splitlines()
    command = line.partition("saved; publish it with: ")[2]
    assert command == f"ether-diffusion push --adapter {tmp_path / 'run'} --repo alice/robot"
    assert read_adapter(tmp_path / "run").parameters
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert main(command.split()[1:]) == 0


def test_a_run_without_an_adapter_is_refused(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_base("tiny").unet.save_pretrained(tmp_path / "run/unet")
    (tmp_path / "run/unet/origin.json").write_text(json.dumps({"base_model": "tiny"}))
    assert push(tmp_path / "run") == 2
    assert "Export it with --format merged" in capsys.readouterr().err


def test_what_failed_its_certificate_is_not_published(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether its method has a LoRA file or not."""
    unet = load_base("tiny").unet
    attach(unet, settings_of("naive", target=r"mid_block.*\.to_[qk]"))
    with pytest.warns(Notice, match="not certified"):  # it is the identity
        ether_diffusion.save_adapter(unet, tmp_path / "saved", base_model="tiny")
    assert push(tmp_path / "saved") == 2
    assert "is not certified: " in capsys.readouterr().err
    assert "alice/robot" not in hub.repositories
    assert push(tmp_path / "saved", "--uncertified") == 0
    assert "certificate.json" in hub.repositories["alice/robot"].files
