"""Tests of exported tokenizers, which transformers loads from the directory that also contains config.json.

The token ids and the chat template of a loaded tokenizer must be those that training used.
"""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import ConfigError
from dpo_engine.model.weights.export import companions
from dpo_engine.model.weights.tokenizer_files import AUTO, FAST, Sample, exported_tokenizer, place
from support.tiny_tokenizers import LINES, TURNS, byte_level, piece_model

OWN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[go]{% endif %}"
)
TALK = [{"role": "user", "content": "which is larger"}]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def config_of(family):
    return AutoConfig.for_model(family, vocab_size=700).to_json_string()


def exported(tmp_path, place_of_tokenizer, family="llama", template=None):
    """Export the tokenizer at ``place_of_tokenizer`` to the directory ``tmp_path/hf``, and return the result."""
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    if template is not None:
        (tmp_path / "own.jinja").write_text(template)
    tokenizer = load_tokenizer(place_of_tokenizer, template and tmp_path / "own.jinja")
    made = exported_tokenizer(companions(source, place_of_tokenizer), config_of(family), tokenizer)
    (tmp_path / "hf").mkdir()
    place(made.files, tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(config_of(family))
    return made


def edit(path, **values):
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**old, **values}))


@pytest.mark.parametrize("family", FAMILIES)
def test_piece_model_is_read_as_sentencepiece_reads_it(family, tmp_path):
    path = piece_model(tmp_path / "tok.model")
    made = exported(tmp_path, path, family, TURNS)
    loader = {AUTO: AutoTokenizer, FAST: PreTrainedTokenizerFast}[made.loader]
    assert made.loader == (FAST if family == "qwen2" else AUTO), "transformers hard-codes the tokenizer class for qwen2"
    found = loader.from_pretrained(tmp_path / "hf")
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in ["which is it", "  is  12 \n", "naïve 你好"]:
        assert found(text, add_special_tokens=False)["input_ids"] == found(text)["input_ids"] == model.encode(text)
    assert (found.bos_token_id, found.eos_token_id) == (1, 2)
    rendered = found.apply_chat_template(TALK, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert rendered == [1, *model.encode("user: which is larger assistant:")]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_without_config_is_read_as_its_own_json_says(family, tmp_path):
    directory = byte_level(tmp_path / "tok")
    made = exported(tmp_path, directory, family)
    loader = {AUTO: AutoTokenizer, FAST: PreTrainedTokenizerFast}[made.loader]
    found, own = loader.from_pretrained(tmp_path / "hf"), Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in ("3+4=7 12345", "which is  it\n\n", "It's"):
        assert found(text)["input_ids"] == own.encode(text).ids
    if family == "qwen2":
        (note,) = made.notes
        wrong = AutoTokenizer.from_pretrained(tmp_path / "hf")
        assert wrong("3+4=7 12345")["input_ids"] != own.encode("3+4=7 12345").ids, (
            "AutoTokenizer must produce other ids, or this test proves nothing"
        )
        assert note.startswith("AutoTokenizer of transformers ")
        assert "'Which number is larger, 9.11 or 9.9?\\n' is tokenized as [" in note and "but training used [" in note
        assert " does not reproduce the training tokenizer from the exported files: " in note
        assert note.endswith("; load the exported tokenizer with PreTrainedTokenizerFast")
    else:
        assert made.notes == []


def test_tokenizer_defined_only_by_its_vocabulary_files(tmp_path):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    (tmp_path / "tok").mkdir()
    inner.model.save(str(tmp_path / "tok"))
    edit(
        tmp_path / "tok" / "tokenizer_config.json",
        tokenizer_class="GPT2Tokenizer",
        eos_token="a",
        bos_token="b",
        unk_token="c",
    )
    trained = AutoTokenizer.from_pretrained(tmp_path / "tok")
    made = exported(tmp_path, tmp_path / "tok", "llama")
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert made.loader == AUTO and not made.notes
    for text in ("3+4=7 12345", "which is  it\n\n"):
        assert found(text)["input_ids"] == trained(text)["input_ids"]


@pytest.mark.parametrize("inside", ["nothing", "settings", "file", "legacy", "list", "folder"])
def test_template_of_the_run_replaces_that_of_the_tokenizer(inside, tmp_path):
    other = {"nothing": None, "settings": None, "list": None}.get(inside, OWN.replace("go", "no"))
    directory = byte_level(tmp_path / "tok", template=other)
    named = [
        {"name": name, "template": f"{name} {{{{ messages }}}}"} for name in ("default", "rag", "tool_use", "../x")
    ]
    if inside == "settings":
        edit(directory / "tokenizer_config.json", chat_template="{{ messages }}")
    if inside == "legacy":
        edit(directory / "chat_template.json", chat_template="{{ messages }}")
    if inside == "list":
        edit(directory / "tokenizer_config.json", chat_template=named)
    if inside == "folder":
        (directory / "additional_chat_templates").mkdir()
        for name in ("rag", "tool_use"):
            (directory / f"additional_chat_templates/{name}.jinja").write_text(f"{name} {{{{ messages }}}}")
    made = exported(tmp_path, directory, template=OWN)
    found = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for given in (None, tools):
        text = found.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, tools=given)
        assert text == "[user] which is larger[go]"
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == OWN
    assert "chat_template" not in json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert not (tmp_path / "hf" / "chat_template.json").exists() and made.loader == AUTO
    dropped = (
        "the chat template named tool_use is not exported: conversations with tools would use it instead of "
        "data.chat_template"
    )
    unnamed = (
        "the chat template named '../x' in tokenizer_config.json is not exported: its name is not a valid file name, "
        "or it has no text"
    )
    assert made.notes == {"list": [unnamed, dropped], "folder": [dropped]}.get(inside, [])
    if inside in ("list", "folder"):
        assert found.chat_template == {"default": OWN, "rag": "rag {{ messages }}"}


@pytest.mark.parametrize("inside", ["list", "folder"])
def test_named_templates_are_exported(inside, tmp_path):
    directory = byte_level(tmp_path / "tok", template=None if inside == "list" else OWN)
    if inside == "list":
        named = [{"name": name, "template": text} for name, text in (("default", OWN), ("rag", "{{ 1 }}"))]
        edit(directory / "tokenizer_config.json", chat_template=named)
    else:
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates/rag.jinja").write_text("{{ 1 }}")
        (directory / "additional_chat_templates/code.py").write_text("evil")
    made = exported(tmp_path, directory)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").chat_template == {"default": OWN, "rag": "{{ 1 }}"}
    assert made.notes == [] and not list((tmp_path / "hf").rglob("*.py"))


def test_named_template_that_links_elsewhere_is_refused(tmp_path):
    directory = byte_level(tmp_path / "tok")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets/private.jinja").write_text("secret")
    (directory / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    with pytest.raises(ConfigError) as caught:
        companions(tmp_path, directory)
    assert str(caught.value) == (
        f"model.tokenizer={directory}: additional_chat_templates/private.jinja links to a file outside that directory; "
        "replace the link with a copy"
    )


def test_a_missing_template_is_noted_and_a_wrong_end_token_is_corrected(tmp_path):
    directory = byte_level(tmp_path / "tok", template=OWN)
    tokenizer = load_tokenizer(directory)
    files = companions(tmp_path / "tok", None)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        assert (directory / name).exists()
    without = {name: path for name, path in files.items() if name != "chat_template.jinja"}
    (note,) = exported_tokenizer(without, config_of("llama"), tokenizer).notes
    assert "its chat template is not the one used in training; load the tokenizer that the run used" in note
    broken = tmp_path / "broken.json"
    shutil.copy(directory / "tokenizer_config.json", broken)
    edit(broken, eos_token="<|bos|>")
    made = exported_tokenizer({**files, "tokenizer_config.json": broken}, config_of("llama"), tokenizer)
    assert made.files["tokenizer_config.json"] != broken and made.notes == [], (
        "another form must reproduce the training tokenizer"
    )


def test_each_kind_of_difference_is_named(tmp_path):
    directory = byte_level(tmp_path / "tok", bos=True)
    sample = Sample(load_tokenizer(directory))
    assert sample.difference(FAST, str(directory)) is None
    values = json.loads((directory / "tokenizer.json").read_text())
    edit(directory / "tokenizer.json", post_processor=None)
    a = values["model"]["vocab"]["a"]
    starts = f"with special tokens, the ids of 'a' begin with [{a}], but began with [0, {a}] in training"
    assert sample.difference(FAST, str(directory)) == starts
    edit(directory / "tokenizer.json", post_processor=values["post_processor"], normalizer={"type": "Lowercase"})
    ids = sample.difference(FAST, str(directory))
    assert (
        ids.startswith("'Which number is larger, 9.11 or 9.9?\\n' is tokenized as [")
        and "('which number is') at position 0, but training used [" in ids
    )
    edit(directory / "tokenizer.json", normalizer=None)
    edit(directory / "tokenizer_config.json", eos_token="<|im_start|>")
    assert sample.difference(FAST, str(directory)) == "the id of its eos token is 1, but was 2 in training"
    (directory / "tokenizer.json").write_text("{")
    assert sample.difference(FAST, str(directory)).startswith("it cannot be loaded (")


def test_tokenizer_that_lost_its_first_token_is_exported_in_another_form(tmp_path):
    directory = byte_level(tmp_path / "tok", bos=True)
    tokenizer = load_tokenizer(directory)
    files = companions(directory, None)
    broken = tmp_path / "broken.json"
    shutil.copy(directory / "tokenizer.json", broken)
    edit(broken, post_processor=None)
    made = exported_tokenizer({**files, "tokenizer.json": broken}, config_of("llama"), tokenizer)
    (tmp_path / "hf").mkdir()
    place(made.files, tmp_path / "hf")
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("a")["input_ids"][0] == 0 and made.notes == []


def test_export_does_not_fail_when_the_tokenizer_cannot_be_converted(tmp_path, monkeypatch):
    def broken(path):
        raise ImportError("no protobuf")

    monkeypatch.setattr("dpo_engine.model.weights.tokenizer_files.conversions", broken)
    made = exported(tmp_path, piece_model(tmp_path / "tok.model"))
    assert list(made.files) == ["tokenizer.model"] and made.loader == AUTO
    assert made.notes[0].endswith("; load the tokenizer that the run used")
