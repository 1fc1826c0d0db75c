"""Tests of `data.columns`, of fields that are read or refused, and of prompts in fields that are not named `prompt`."""

import json

import pytest

from dpo_engine.config.sections import DataConfig
from dpo_engine.data.columns import renamed, target_problems
from dpo_engine.data.formats import FORMATS, BadRecord, Pair, checked, detect, read_pairs, recognize
from dpo_engine.data.records import BadLines
from dpo_engine.data.tokenize import _cache_key
from dpo_engine.errors import DataError

ASK = {"role": "user", "content": "What is 2 plus 2?"}
TEXT = {"prompt": "What is 2 plus 2?", "chosen": "It is 4, says the heron.", "rejected": "It is 5, I think."}
ANSWERS = {name: TEXT[name] for name in ("chosen", "rejected")}
CHAT = {name: [{"role": "assistant", "content": text}] for name, text in ANSWERS.items()} | {"prompt": [ASK]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "default": None}}}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class TestPromptUnderAnotherName:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *((name, TEXT["prompt"]) for name in ("Question", "QUERY", "user_input", "userInput", "context", "input")),
            *((name, TEXT["prompt"]) for name in ("prompt_text", "user-query", "dialogue", "Problem", "inputs")),
            *((name, TEXT["prompt"]) for name in ("source", "info", "topic", "subject")),
            ("query", "why"),
            ("q", "why"),
            ("user", "why?"),
            ("history", [["a", "b"]]),
            ("conversation", {"turns": ["a"]}),
            ("text", "What is 2 plus 2?"),
            ("Frage", "Was ist zwei plus zwei?"),
            ("\u554f", "\u4e8c\u52a0\u4e8c\u7b49\u4e8e\u591a\u5c11\uff1f"),
        ],
    )
    def test_record_is_refused_and_the_field_is_named(self, name, value, tmp_path):
        path = write(tmp_path / "a.jsonl", {name: value, **ANSWERS})
        with pytest.raises(DataError) as error:
            list(read_pairs(path))
        message = str(error.value)
        assert message.startswith(f"{path}:1: {name!r} may be the prompt; ")
        assert f"data.columns={{prompt: {name}}}" in message and "format: implicit" in message

    def test_a_description_shorter_than_the_common_prefix_is_no_prompt(self):
        described = {"source": "a set of invented questions", "topic": "sums of small numbers"}
        whole = {name: f"Question: {TEXT['prompt']} Answer: {text}" for name, text in ANSWERS.items()}
        assert detect({**whole, **described}) is FORMATS["implicit"]
        with pytest.raises(BadRecord, match="'source' may be the prompt"):
            detect({**ANSWERS, **described})

    @pytest.mark.parametrize(
        ("row", "name"),
        [
            ({"data": {"question": "why"}}, "'question' in 'data'"),
            ({"meta": {"source": {"userQuery": "why"}}}, "'userQuery' in 'meta.source'"),
            ({"items": [{"id": 1}, {"instruction": "add"}]}, "'instruction' in 'items'"),
        ],
    )
    def test_nested_field_is_named(self, row, name):
        with pytest.raises(BadRecord, match=f"{name} may be the prompt; make it the field 'prompt', or set format: i"):
            detect({**row, **ANSWERS})

    def test_an_object_in_the_place_of_a_text_is_described(self):
        with pytest.raises(BadRecord, match="chosen must be text, not an object with question, answer"):
            FORMATS["text"]({**TEXT, "chosen": {"question": "why", "answer": "4"}})
        with pytest.raises(BadRecord, match="prompt must be text or a list of messages, not an object with question"):
            FORMATS["auto"]({**TEXT, "prompt": {"question": "why"}})

    def test_human_and_assistant_turns_beside_a_prompt_are_refused(self):
        turns = {name: f"\n\nHuman: Add.\n\nAssistant: {text}" for name, text in ANSWERS.items()}
        assert detect(turns) is FORMATS["hh"]
        for name in ("question", "instruction", "query"):
            with pytest.raises(BadRecord, match=f"'{name}' may be the prompt; .* or format: hh if it is not"):
                detect({**turns, name: "What is 2 plus 2?"})

    def test_responses_as_messages_without_a_user_turn(self):
        row = {"query": "What is 2 plus 2?", "chosen": CHAT["chosen"], "rejected": CHAT["rejected"]}
        with pytest.raises(BadRecord, match="'query' may be the prompt"):
            detect(row)

    def test_a_later_record_of_the_file_is_refused(self, tmp_path):
        path = write(tmp_path / "a.jsonl", ANSWERS, {**ANSWERS, "question": "why"}, ANSWERS)
        bad = BadLines(skip=True)
        assert [line for line, _ in read_pairs(path, "auto", bad)] == [1, 3]
        assert bad.count == 1 and ":2: 'question' may be the prompt" in bad.first[0]

    def test_no_record_is_left_when_bad_lines_are_skipped(self, tmp_path):
        path = write(tmp_path / "a.jsonl", *[{**ANSWERS, "user_input": "What is 2 plus 2?"}] * 3)
        bad = BadLines(skip=True)
        assert list(read_pairs(path, "auto", bad)) == [] and bad.count == 3
        assert recognize(path, "auto", None, skip=True) is None

    def test_a_format_that_is_named_reads_the_record(self, tmp_path):
        path = write(tmp_path / "a.jsonl", {**ANSWERS, "question": "why"})
        ((_, (pair,)),) = read_pairs(path, "implicit")
        assert pair.prompt == "It is"

    @pytest.mark.parametrize(
        "harmless",
        [
            {"id": "a-7", "source": "invented questions", "score": 3, "metadata": {"annotator": "A7"}, "user": "u7"},
            {"prompt_id": "8f", "question_type": "sums of two numbers", "context_length": 12, "input_tokens": [1, 2]},
            {"rationale": "The first answer is right.", "chosen_model": "a b c d", "rejected_score": 0.5},
            {"query": "", "context": None, "messages": [], "history": {"a": None}},
            {"split": "train", "train": True, "mask": "User", "created_at": "2026-11-28 14:00 and later"},
            {"unit": "heron", "n_words": 12.5, "flag": False},
        ],
    )
    def test_fields_without_a_meaning_do_no_harm(self, harmless):
        assert detect({**ANSWERS, **harmless}) is FORMATS["implicit"]
        assert checked(FORMATS["auto"]({**ANSWERS, **harmless})).prompt == "It is"
        assert checked(FORMATS["auto"]({**TEXT, **harmless})) == Pair(**TEXT)
        assert checked(FORMATS["auto"]({**CHAT, **harmless})).chosen == TEXT["chosen"]

    def test_text_before_an_explicit_prompt_is_refused(self, tmp_path):
        for name, value in (("context", "2 is a number."), ("history", [["a", "b"]])):
            with pytest.raises(BadRecord, match=f"there is a prompt; to leave out {name}, set format: text; to"):
                detect({**TEXT, name: value})
            assert FORMATS["text"]({**TEXT, name: value}) == Pair(**TEXT)
            path = write(tmp_path / "a.jsonl", TEXT, {**TEXT, name: value})
            with pytest.raises(DataError, match=f":2: {name} is not read if there is a prompt"):
                list(read_pairs(path))


class TestColumns:
    def test_fields_are_renamed_before_the_format_sees_them(self, tmp_path):
        row = {"q": TEXT["prompt"], "good": TEXT["chosen"], "bad": TEXT["rejected"], "prior": "Be brief.", "fn": [TOOL]}
        columns = {"prompt": "q", "chosen": "good", "rejected": "bad", "system": "prior", "tools": "fn"}
        path = write(tmp_path / "a.jsonl", row)
        ((_, (pair,)),) = read_pairs(path, "messages", None, columns)
        assert pair == Pair(
            ({"role": "system", "content": "Be brief."}, ASK), TEXT["chosen"], TEXT["rejected"], tools=(TOOL,)
        )
        assert recognize(write(tmp_path / "b.jsonl", {"q": "a", **ANSWERS}), "auto", {"prompt": "q"}, skip=False) == (
            "text",
            {"prompt": "a", **ANSWERS},
        )

    def test_null_leaves_out_a_field(self):
        row = {**ANSWERS, "question": "why", "image": "a.png"}
        assert renamed(row, {"question": None, "image": None, "absent": None}) == ANSWERS

    def test_two_fields_can_change_places(self):
        columns = {"chosen": "rejected", "rejected": "chosen"}
        assert renamed(ANSWERS, columns) == {"chosen": ANSWERS["rejected"], "rejected": ANSWERS["chosen"]}
        assert renamed(ANSWERS, {"chosen": "chosen"}) == ANSWERS and renamed(ANSWERS, None) is ANSWERS

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            (ANSWERS, "data.columns.prompt=q: there is no field 'q' (found chosen, rejected)"),
            ({"q": "a", **TEXT}, "data.columns.prompt=q: the record also has a field 'prompt'; rename one of the two"),
            ({"q": "a", **ANSWERS, "prompt": None}, "data.columns.prompt=q: the record also has a field 'prompt'"),
        ],
    )
    def test_absent_and_doubled_fields_are_errors_with_a_line(self, row, says, tmp_path):
        path = write(tmp_path / "a.jsonl", {"q": "2 + 2 =", **ANSWERS}, row)
        with pytest.raises(DataError) as error:
            list(read_pairs(path, "auto", None, {"prompt": "q"}))
        assert str(error.value).startswith(f"{path}:2: {says}")

    def test_unknown_targets_are_refused(self, tmp_path, monkeypatch):
        path = write(tmp_path / "a.jsonl", TEXT)
        with pytest.raises(DataError) as error:
            list(read_pairs(path, "text", None, {"promt": "q"}))
        assert str(error.value) == (
            f"{path}: data.columns.promt: format text has no field 'promt'; in data.columns, the "
            "key is the format's field name and the value is the field name in your records; did you mean prompt?"
        )
        assert target_problems({"question": "q"}, "text") and not target_problems({"question": "q"}, "auto")
        assert not target_problems({"margin": "m", "tools": "t", "whatever": None}, "hh")
        monkeypatch.setitem(FORMATS, "own", lambda row: Pair(row["a"], row["b"], row["c"]))  # declares no fields
        assert not target_problems({"a": "q"}, "own")

    def test_every_built_in_format_declares_its_fields(self):
        ours = [name for name, entry in FORMATS.items() if entry.__module__.startswith("dpo_engine") and name != "auto"]
        assert all(FORMATS[name].fields for name in ours) and len(ours) == 15

    def test_a_source_has_its_own_columns(self):
        config = DataConfig(
            train=["a.jsonl", {"path": "b.jsonl", "columns": {"prompt": "query"}}],
            validation=["c.jsonl"],
            columns={"prompt": "question"},
        )
        assert [source.columns for source in (*config.train, *config.validation)] == [
            {"prompt": "question"},
            {"prompt": "query"},
            {"prompt": "question"},
        ]
        assert DataConfig.model_validate(config.model_dump()) == config
        assert DataConfig(train=["a.jsonl"]).train[0].columns is None

    @pytest.mark.parametrize("where", ["data", "source"])
    def test_a_field_cannot_be_used_twice(self, where):
        columns = {"prompt": "a", "system": "a"}
        given = {"train": ["a.jsonl"], "columns": columns}
        if where == "source":
            given = {"train": [{"path": "a.jsonl", "columns": columns}]}
        with pytest.raises(ValueError, match="a mapping that uses each field once, but a is used twice"):
            DataConfig(**given)

    def test_columns_are_part_of_the_cache_key(self, tmp_path):
        class Tokenizer:
            digest = "t"
            rows = None

        path = str(write(tmp_path / "a.jsonl", TEXT))
        configs = [DataConfig(train=[path], columns=columns) for columns in (None, {"prompt": "q"}, {"prompt": "p"})]
        assert len({_cache_key(config.train, Tokenizer, config) for config in configs}) == 3


class TestEarlierTurns:
    @pytest.mark.parametrize("name", ["context", "history"])
    @pytest.mark.parametrize(
        ("form", "row"),
        [
            ("messages", CHAT),
            ("nemo_aligner", {"prompt": "2 + 2 =", "chosen_response": " 4", "rejected_response": " 5"}),
            ("orca", {"question": "2 + 2?", "chosen": "4", "rejected": "5"}),
            ("ranked", {"prompt": "2 + 2 =", "responses": [" 4", " 5"], "scores": [1, 0]}),
        ],
    )
    def test_earlier_turns_that_a_format_does_not_read_are_refused(self, form, row, name, tmp_path):
        path = write(tmp_path / "a.jsonl", {**row, name: "Herons wait by the water."})
        with pytest.raises(DataError, match=f"{name} is not read by this format; set data.columns={{{name}: null}}"):
            list(read_pairs(path, form))
        assert len(list(read_pairs(path, form, columns={name: None}))) == 1


class TestFieldsWithAMeaning:
    @pytest.mark.parametrize("row", [TEXT, CHAT, ANSWERS], ids=["text", "messages", "implicit"])
    @pytest.mark.parametrize(
        "name",
        [
            *("image", "images", "video", "videos", "audio", "audios", "Image", "rejected_images"),
            *("image_path", "img", "image_url", "audioFile", "chosen_image"),
        ],
    )
    def test_media_are_refused(self, row, name):
        for value in ("a.png", ["a.png"], {"bytes": None, "path": "a.png"}):
            with pytest.raises(
                BadRecord,
                match=f"^{name}: only text is supported; set data.columns=.{name}: null. to leave out this field$",
            ):
                FORMATS["auto"]({**row, name: value})
        for empty in (None, "", [], "[]", {"bytes": None, "path": None}, [None], b"", False, 2):
            assert checked(FORMATS["auto"]({**row, name: empty}))

    @pytest.mark.parametrize("row", [TEXT, ANSWERS], ids=["text", "implicit"])
    @pytest.mark.parametrize(
        ("name", "value", "way"),
        [
            ("system", "Be brief.", "set format: messages, or data.columns=.system: null. to leave out this field"),
            ("tools", [TOOL], "set data.columns=.tools: null. to leave out this field"),
            ("tools", json.dumps([TOOL]), "set data.columns=.tools: null. to leave out this field"),
            (
                "chat_template_kwargs",
                {"enable_thinking": False},
                "set data.columns=.chat_template_kwargs: null. to leave",
            ),
        ],
    )
    def test_fields_of_conversations_are_refused_in_plain_text(self, row, name, value, way):
        with pytest.raises(BadRecord, match=f"{name} needs a conversation; {way}"):
            FORMATS["auto"]({**row, name: value})

    @pytest.mark.parametrize("empty", [None, "", "[]", "null", [], "{}", {}])
    @pytest.mark.parametrize("name", ["tools", "chat_template_kwargs"])
    def test_empty_tools_and_options_are_none(self, name, empty):
        for row in (TEXT, CHAT):
            pair = FORMATS["auto"]({**row, name: empty})
            assert pair.tools is None and pair.template_options is None

    def test_nulls_that_tables_add_are_dropped_from_tools_and_options(self):
        row = {**CHAT, "tools": [TOOL | {"strict": None}], "chat_template_kwargs": {"a": 1, "b": None}}
        pair = FORMATS["messages"](row)
        assert pair.tools == (TOOL,) and pair.template_options == {"a": 1}
        assert FORMATS["messages"]({**CHAT, "tools": [json.dumps(TOOL)]}).tools == (TOOL,)
        assert FORMATS["messages"]({**CHAT, "chat_template_kwargs": '{"a": 1}'}).template_options == {"a": 1}

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"tools": "tide()"}, "tools is text, but not JSON: "),
            ({"tools": "[1 2]"}, "tools is text, but not JSON: invalid JSON at column 4: "),
            ({"tools": '[], "a": 1'}, "tools is text, but not JSON: there is more than one value"),
            ({"tools": [1]}, "tools must be a list of JSON schemas, not a list with a number"),
            ({"tools": {"name": "a"}}, "tools must be a list of JSON schemas, not an object"),
            ({"chat_template_kwargs": [1]}, "chat_template_kwargs must be an object, not a list"),
            (
                {"chat_template_kwargs": {"chat_template": "a"}},
                "chat_template_kwargs.chat_template: data cannot set this",
            ),
            ({"chat_template_kwargs": {"return_dict": True}}, "chat_template_kwargs.return_dict: data cannot set this"),
            (
                {"system_prompt": "Be brief."},
                "system_prompt is not read; set data.columns={system: system_",
            ),
            ({"System": "Be brief."}, "System is not read; set data.columns={system: System}"),
            ({"Tools": [TOOL]}, "Tools is not read; set data.columns={tools: Tools}"),
            (
                {"loss_mask": [0, 1]},
                "loss_mask is not read; set weight 0 on the turns that must not be scored, or set data.columns={loss",
            ),
            ({"train": [False, True]}, "train is not read; set weight 0 on the turns that must not be scored"),
            ({"chosen_mask": [0, 1]}, "chosen_mask is not read; set weight 0 on the turns that must not"),
            ({"functions": [TOOL]}, "functions is not read; set data.columns={tools: functions}"),
            ({"rejected_tools": [TOOL]}, "rejected_tools is not read; set data.columns={rejected_tools: null}"),
            ({"documents": [{"text": "a"}]}, "documents is not read; set data.columns={documents: null} to leave"),
            ({"system": 3}, "system must be text, not a number"),
            ({"system": " "}, "system contains only whitespace"),
        ],
    )
    def test_unusable_values_are_refused(self, changes, says):
        with pytest.raises(BadRecord) as error:
            FORMATS["messages"]({**CHAT, **changes})
        assert str(error.value).startswith(says)

    @pytest.mark.parametrize(
        "row",
        [
            CHAT,
            {**CHAT, "prompt": ASK["content"]},
            TEXT,
            {**TEXT, "chosen": CHAT["chosen"][0]},
            {name: [ASK, *CHAT[name]] for name in ANSWERS},
            {name: [ASK, *CHAT[name]] for name in ANSWERS} | {"prompt": ASK["content"]},
            {name: [ASK, *CHAT[name]] for name in ANSWERS} | {"prompt": [ASK]},
        ],
    )
    def test_system_becomes_the_first_turn(self, row):
        pair = checked(FORMATS["messages"]({**row, "system": "Be brief."}))
        assert pair == Pair(({"role": "system", "content": "Be brief."}, ASK), TEXT["chosen"], TEXT["rejected"])

    def test_system_and_tools_in_ranked_lists(self):
        row = {"prompt": [ASK], "responses": [CHAT["chosen"], CHAT["rejected"]], "scores": [2, 1]}
        (pair,) = FORMATS["ranked"]({**row, "system": "Be brief.", "tools": [TOOL], "chat_template_kwargs": {"a": 1}})
        assert pair.prompt == ({"role": "system", "content": "Be brief."}, ASK)
        assert pair.tools == (TOOL,) and pair.template_options == {"a": 1}
        plain = {"prompt": "a", "responses": ["b", "c"], "scores": [2, 1], "system": "Be brief."}
        with pytest.raises(BadRecord, match="system needs a conversation"):
            FORMATS["ranked"](plain)


class TestMessagesWrittenAsText:
    @pytest.mark.parametrize("quote", [json.dumps, str])
    @pytest.mark.parametrize("name", ["chosen", "prompt"])
    def test_they_are_refused(self, quote, name):
        row = {**TEXT, name: quote([ASK, {"role": "assistant", "content": "4"}])}
        for known in ("text", "messages", "auto"):
            with pytest.raises(BadRecord, match=f"{name} is a list of messages written as text; store it as a list"):
                FORMATS[known](row)

    @pytest.mark.parametrize(
        "answer", ['[{"value": 3}]', '[{"role": "king"}]', "[{'a': 1}]", '[{"role": ', '{"role": "user"}', "[]"]
    )
    def test_other_json_is_text(self, answer):
        assert FORMATS["text"]({**TEXT, "chosen": answer}).chosen == answer
