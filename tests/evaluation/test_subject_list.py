"""The data set's list of classes and prompts: read in any format, and compared to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.protocols import SubjectProtocol, load_protocol
from ether_diffusion.evaluation.subject_list import FILE, check_subject_list, read_subject_list

TEXT = """Classes

subject_name,class
backpack_dog,backpack
dog,dog
bear_plushie,stuffed animal

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the snow'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
]
"""
VARIANTS = {
    "line ends": TEXT.replace("\n", "\r\n"),
    "byte order mark": "\ufeff" + TEXT,
    "quotes": TEXT.replace("'", '"'),
    "without format": TEXT.replace(".format(unique_token, class_token)", ""),
    "blank lines and indents": TEXT.replace("\n", "\n\n  "),
    "headings": TEXT.replace("Object Prompts", "OBJECT PROMPTS:"),
    "spaces": TEXT.replace("dog,dog", " dog , dog "),
}


def protocol(**changed: object) -> SubjectProtocol:
    """The content of TEXT as a protocol."""
    whole = load_protocol(SubjectProtocol, "dreambooth/subject-macro-v1").model_dump(mode="json") | {
        "name": "tests/list",
        "subjects": {
            "backpack_dog": {"class_name": "backpack", "prompts": "object"},
            "dog": {"class_name": "dog", "prompts": "live"},
        },
        "prompts": {
            "object": ["a {subject} in the snow", "a cube shaped {subject}"],
            "live": ["a {subject} wearing a red hat"],
        },
    }
    return SubjectProtocol.model_validate(whole | changed)


@pytest.mark.parametrize("form", VARIANTS)
def test_the_format_of_the_file_does_not_matter(tmp_path: Path, form: str) -> None:
    (tmp_path / FILE).write_text(VARIANTS[form], encoding="utf-8", newline="")
    found = read_subject_list(tmp_path / FILE)
    assert found.classes == {"backpack_dog": "backpack", "dog": "dog", "bear_plushie": "stuffed animal"}
    assert found.prompts == {name: tuple(templates) for name, templates in protocol().prompts.items()}
    check_subject_list(protocol(), found)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dog,dog", "dog", r"txt:5: 'dog'; expected SUBJECT,CLASS"),
        ("bear_plushie,", "dog,", r"txt:6: 'dog,stuffed animal'; expected SUBJECT,CLASS, each subject once"),
        ("'a {0} {1} in", "'a {0} in", r"txt:13: 'a \{0\} in the snow'; expected \{0\} \{1\} in it once"),
        ("'a {0} {1} in the snow'", "a {0} {1} in the snow", r"txt:13: .* expected a prompt in quotes"),
        ("a cube shaped {0} {1}", "a {0} {1} in the snow", r"txt:14: .* is in its list twice"),
        ("Classes\n", "\n", r"txt:4: 'backpack_dog,backpack' is under no heading"),
        ("Live Subject Prompts", "Object Prompts", r"no live in it"),
    ],
)
def test_faulty_lines_are_reported_with_their_numbers(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert TEXT.count(old) >= 1
    (tmp_path / FILE).write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_subject_list(tmp_path / FILE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("in the snow", "in the  Snow", r"object prompts: 'a \{subject\} in the Snow'; tests/list has 'a .* snow'"),
        ("a red hat'.format(unique_token, class_token),", "a red hat',\n'a {0} {1}',", r"'a \{subject\}'.*'\(none\)'"),
        ("dog,dog", "dog7,dog", r"dog is None; tests/list has 'dog'"),
        ("backpack_dog,backpack", "backpack_dog,backpacks", r"backpack_dog is 'backpacks'"),
    ],
)
def test_small_differences_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    (tmp_path / FILE).write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        check_subject_list(protocol(), read_subject_list(tmp_path / FILE))


def test_a_dog_takes_the_prompts_of_live_subjects(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(TEXT)
    subjects = {"dog": {"class_name": "dog", "prompts": "object"}}
    with pytest.raises(UserError, match="dog, a dog, has object prompts; expected live"):
        check_subject_list(protocol(subjects=subjects), read_subject_list(tmp_path / FILE))


def test_a_protocol_with_lists_of_its_own_is_not_checked(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(TEXT)
    own = protocol(subjects={"dog": {"class_name": "hound", "prompts": "own"}}, prompts={"own": ["a {subject} asleep"]})
    check_subject_list(own, read_subject_list(tmp_path / FILE))


@pytest.mark.parametrize("name", ["dreambooth/subject-macro-v1", "dreambooth/oft-v1", "tinyworld/rehearsal-v1"])
def test_the_shipped_protocols_agree_with_the_data_set(shared: Path, name: str) -> None:
    found = read_subject_list(shared / "data/dreambooth/dataset" / FILE)
    shipped = load_protocol(SubjectProtocol, name)
    check_subject_list(shipped, found)
    assert shipped.subjects.keys() == found.classes.keys()
    assert {len(templates) for templates in shipped.prompts.values()} == {25}
