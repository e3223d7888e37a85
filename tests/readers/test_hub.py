"""Hugging Face data sets, from folders: nothing here needs the network."""

from __future__ import annotations

import pytest

from mech_absa.errors import DataError
from mech_absa.examples import Polarity
from mech_absa.readers import load_examples

datasets = pytest.importorskip("datasets")

POS, NEG, NEU = Polarity.POSITIVE, Polarity.NEGATIVE, Polarity.NEUTRAL

FLAT = {
    "text": ["my tea", "tea or tea", "bad cup"],
    "aspect": ["tea", "tea", "cup"],
    "label": ["positive", "neutral", "negative"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def saved(tmp_path, columns: dict, features=None, name: str = "laptop_set") -> str:
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / name)
    return str(tmp_path / name)


def test_a_flat_table_saved_to_disk(tmp_path):
    path = saved(tmp_path, FLAT)
    examples = load_examples(path)
    assert [(e.aspect, e.span, e.polarity, e.line, e.id) for e in examples] == [
        ("tea", (3, 6), POS, 1, "laptop_set:1"),
        ("tea", (0, 3), NEU, 2, "laptop_set:2"),
        ("cup", (4, 7), NEG, 3, "laptop_set:3"),
    ]
    assert {(e.source, e.domain) for e in examples} == {(path, "laptop")}
    assert examples.ambiguous == 1 and len(examples.sha256) == 64
    # The hash is of what is asked, not of the files: a second copy has the same.
    assert load_examples(f"hf:{saved(tmp_path, FLAT, name='copy')}").sha256 == examples.sha256
    changed = {**FLAT, "label": ["positive", "neutral", "neutral"]}
    assert load_examples(saved(tmp_path, changed, name="other")).sha256 != examples.sha256


def test_class_numbers_are_read_by_their_names(tmp_path):
    # In this order 1 is neutral and 0 negative: taken as numbers they would be two wrong answers.
    names = datasets.ClassLabel(names=["negative", "neutral", "positive"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "aspect": datasets.Value("string"), "label": names}
    )
    examples = load_examples(saved(tmp_path, {**FLAT, "label": [2, 1, 0]}, features))
    assert [e.polarity for e in examples] == [POS, NEU, NEG]


def test_class_numbers_inside_a_list_and_no_class_at_all(tmp_path):
    names = datasets.ClassLabel(names=["negative", "neutral", "positive"])
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "aspects": [{"term": datasets.Value("string"), "polarity": names}],
        }
    )
    columns = {
        "text": ["my tea", "my cup"],
        "aspects": [[{"term": "tea", "polarity": 0}], [{"term": "cup", "polarity": -1}]],
    }
    examples = load_examples(path := saved(tmp_path, columns, features), skip_bad=True)
    assert [(e.span, e.polarity) for e in examples] == [((3, 6), NEG)]
    # -1 is how the library writes that a row has no class: taken as a number it would be negative.
    assert examples.problems[0].startswith(f"{path}:2: unknown label ''")


def test_bare_class_numbers_need_a_word(tmp_path):
    path = saved(tmp_path, {**FLAT, "label": [1, 1, 0]})
    with pytest.raises(DataError, match="bare numbers"):
        load_examples(path)
    assert [e.polarity for e in load_examples(path, labels={"0": "negative", "1": "neutral"})] == [
        NEU,
        NEU,
        NEG,
    ]


def test_offsets_and_missing_cells(tmp_path):
    rows = {
        "text": ["tea tea", "tea tea"],
        "target": ["tea", "tea"],
        "from": [4, None],
        "to": [7, None],
        "sentiment": ["pos", "neg"],
    }
    assert [e.span for e in load_examples(saved(tmp_path, rows))] == [(4, 7), (0, 3)]


@pytest.mark.parametrize("as_lists", [False, True])
def test_a_list_of_aspects_a_row(tmp_path, as_lists):
    aspects = [
        [
            {"term": "tea", "polarity": "positive", "from": "4", "to": "7"},
            {"term": "cup", "polarity": "conflict", "from": "8", "to": "11"},
        ],
        [],
        [{"term": "cup", "polarity": "negative", "from": "0", "to": "3"}],
    ]
    categories = [[{"category": "food", "polarity": "neutral"}]] * 3
    if as_lists:
        aspects = [
            {k: [a[k] for a in row] for k in ("term", "polarity", "from", "to")} for row in aspects
        ]
    columns = {
        "sentenceId": ["a", "b", "c"],
        "text": ["tea tea cup", "none", "cup"],
        "aspectTerms": aspects,
        "aspectCategories": categories,
    }
    examples = load_examples(saved(tmp_path, columns))
    assert [(e.aspect, e.span, e.polarity, e.id) for e in examples] == [
        ("tea", (4, 7), POS, "laptop_set:1.1"),
        ("cup", (0, 3), NEG, "laptop_set:3.1"),
    ]
    assert examples.left_out == {"conflict": 1, "sentence without aspects": 1}


def test_splits_are_chosen_never_guessed(tmp_path):
    both = datasets.DatasetDict(
        {
            s: datasets.Dataset.from_dict({k: v[i:] for k, v in FLAT.items()})
            for i, s in enumerate(["train", "test"])
        }
    )
    both.save_to_disk(tmp_path / "set")
    path = str(tmp_path / "set")
    assert [len(load_examples(path, split=s)) for s in ("train", "test")] == [3, 2]
    assert load_examples(path, split="test")[0].id == "set/test:1"
    assert len(load_examples(f"hf:{path}:test")) == 2
    with pytest.raises(
        DataError,
        match=r"set: no split was named; there are train or test; write it as hf:.*set:train",
    ):
        load_examples(path)
    with pytest.raises(DataError, match="there is no split 'dev'; there are train or test"):
        load_examples(path, split="dev")


def test_a_folder_of_data_files(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    datasets.Dataset.from_dict(FLAT).to_csv(folder / "train.csv")
    assert [e.span for e in load_examples(folder)] == [(3, 6), (0, 3), (4, 7)]


def test_columns_by_name(tmp_path):
    path = saved(tmp_path, {"comment": ["my tea"], "what": ["tea"], "label": ["pos"]})
    assert load_examples(path, columns={"sentence": "comment", "aspect": "what"})[0].span == (3, 6)


def test_a_bad_row_is_named(tmp_path):
    path = saved(tmp_path, {**FLAT, "aspect": ["tea", "milk", "cup"]})
    with pytest.raises(DataError) as caught:
        load_examples(path)
    assert str(caught.value).startswith(
        f"{path}:2: the aspect 'milk' does not stand in the sentence 'tea or tea'"
    )
    skipped = load_examples(path, skip_bad=True)
    assert [e.line for e in skipped] == [1, 3] and skipped.problems == (str(caught.value),)


def test_columns_that_are_no_questions_are_named(tmp_path):
    with pytest.raises(DataError, match="the field 'aspect' is missing; there are: text, label"):
        load_examples(saved(tmp_path, {k: FLAT[k] for k in ("text", "label")}), skip_bad=True)


def test_a_folder_that_is_no_data_set_is_named(tmp_path):
    (tmp_path / "notes.xyz").write_text("x")
    with pytest.raises(
        DataError,
        match=r"no data set could be loaded from it \(it holds .*notes\.xyz\): .*; accepted: one file",
    ):
        load_examples(tmp_path)


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c", "hf:/x", "hf::train"])
def test_what_is_no_id_is_named(name):
    with pytest.raises(
        DataError, match="no id of a data set; accepted: hf:OWNER/NAME or hf:OWNER/NAME:SPLIT"
    ):
        load_examples(name)


def test_without_a_network_the_hub_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError,
        match=r"hf:no-such-owner/no-such-set: no data set could be loaded from it: .*; accepted: ",
    ) as caught:
        load_examples("hf:no-such-owner/no-such-set")
    assert "\n" not in str(caught.value)
