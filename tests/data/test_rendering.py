"""Tests of rendering conversations: the same token ids as TRL and transformers, scored turns, and template faults."""

import json
import pickle
from types import SimpleNamespace

import pytest
import transformers
from transformers.utils import chat_template_utils

from dpo_engine.data.tokenizer import load_tokenizer
from dpo_engine.errors import DataError
from support.built import Builder, ids
from support.malformed import ALSO_GOOD, GOOD, RIGHT, SYSTEM, USER, WRONG
from support.tiny_tokenizers import CHATML, TURNS, byte_level, metaspace

TOOL = {"type": "function", "function": {"name": "compare", "description": "Compare.", "parameters": {}}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "compare", "arguments": {"a": 1, "b": 2}}}],
}
RESULT = {"role": "tool", "name": "compare", "content": "2"}
AGENT = (  # as in agent models' templates: tools first, calls as JSON, and generation marks around assistant turns
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAST_TURN_DIFFERS = AGENT.replace(
    "{{ m.content }}{%", "{% if loop.last %}<think></think>{% endif %}{{ m.content }}{%", 1
)


@pytest.fixture
def build(tmp_path):
    return Builder(tmp_path, byte_level(tmp_path / "tokenizer", template=AGENT))


def rendered(build, messages, **options):
    library = transformers.AutoTokenizer.from_pretrained(build.tokenizer_path)
    return library.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def own_template(build, tmp_path, text):
    (tmp_path / "own.jinja").write_text(text)
    return load_tokenizer(build.tokenizer_path, tmp_path / "own.jinja")


def trl_ids(path, rows):
    """Prepare rows as TRL's trainer does. Return the ids of prompt, chosen and rejected for each row."""
    import datasets
    from trl import DPOTrainer

    library = transformers.AutoTokenizer.from_pretrained(path)
    datasets.disable_progress_bars()
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=library),
        datasets.Dataset.from_list(rows),
        library,
        SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start"),
        "train",
    )
    return [[row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] for row in prepared]


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_ids_are_those_of_trl(make, tmp_path):
    texts = [
        GOOD,
        {"prompt": "which is larger? 7 + 4 =", "chosen": "11", "rejected": "12"},
        {"prompt": "which is larger? ", "chosen": " the second", "rejected": "the first"},
        {"prompt": "we think so:\n", "chosen": "of them", "rejected": "a question"},
        {"prompt": "it was a quest", "chosen": "ion to me", "rejected": "ion to ask"},  # the prompt ends inside a word
    ]
    talks = [
        {"prompt": [SYSTEM, USER], "chosen": [RIGHT], "rejected": [WRONG]},
        {"prompt": [USER], "chosen": [RIGHT, USER, WRONG], "rejected": [WRONG]},
    ]
    path = make(tmp_path / "tokenizer", template=CHATML if make is byte_level else TURNS)
    build = Builder(tmp_path, path)
    eos = transformers.AutoTokenizer.from_pretrained(path).eos_token_id
    dataset, _ = build(texts, talks)
    expected = trl_ids(path, texts) + trl_ids(path, talks)
    for pair, (prompt, chosen, rejected) in zip(dataset, expected, strict=True):
        got = ids(pair)
        assert got[0] == prompt
        for response, full in zip(got[1:], (chosen, rejected), strict=True):
            # TRL appends the EOS to text, as the engine does. In conversations, only TRL keeps the line feed after the
            # last turn.
            assert response == full[: len(response)] and (full[len(response) :] == [] or response[-1] == eos)


def test_prompt_that_merges_into_the_response_is_refused(build):
    message = "the prompt alone and the prompt with a response start with different tokens; add a space after the "
    with pytest.raises(DataError, match=message):
        build([{"prompt": "wh", "chosen": "ich", "rejected": "ich number"}])


class TestTurns:
    ROW = {
        "prompt": [USER],
        "chosen": [
            CALL,
            RESULT,
            RIGHT,
            {"role": "user", "content": "Why?"},
            {**WRONG, "reasoning_content": "It is so."},
        ],
        "rejected": [WRONG],
        "tools": [TOOL],
    }

    @staticmethod
    def expected_mask(build, row, name, template=None):
        """Return a response's ids and mask. transformers computes the mask from the template's generation marks."""
        library = transformers.AutoTokenizer.from_pretrained(build.tokenizer_path)
        given = {"tools": row.get("tools"), "return_dict": True, "chat_template": template}
        whole = library.apply_chat_template([*row["prompt"], *row[name]], return_assistant_tokens_mask=True, **given)
        start = len(library.apply_chat_template(row["prompt"], add_generation_prompt=True, **given)["input_ids"])
        return whole["input_ids"][start:], [bool(part) for part in whole["assistant_masks"][start:]]

    @pytest.mark.parametrize("template", [AGENT, LAST_TURN_DIFFERS])
    def test_only_assistant_turns_are_scored(self, template, build, tmp_path):
        dataset, report = build([self.ROW], tokenizer=own_template(build, tmp_path, template))
        (pair,) = dataset
        tokens, mask = self.expected_mask(build, self.ROW, "chosen", template)
        assert pair.chosen.tolist() == tokens[:-1]  # without the line feed after the last turn
        assert pair.chosen_mask.tolist() == mask[:-1] and not all(mask[:-1])
        assert pair.rejected_mask is None and report.masked == 1
        assert pair.scored_counts == (sum(mask), len(pair.rejected))
        assert dataset.scored.tolist() == [[sum(mask), len(pair.rejected)]]
        assert "1 pair with unscored turns in a response" in str(report)

    def test_turns_with_weight_0_are_not_scored(self, build):
        for key, value in (("weight", 0), ("training", False), ("masked", True)):
            row = {**self.ROW, "chosen": [{**CALL, key: value}, RESULT, RIGHT]}
            (pair,) = build([row], cache=key)[0]
            with_call = build([{**row, "chosen": [CALL, RESULT, RIGHT]}], cache=f"{key}-all")[0][0]
            assert pair.chosen.tolist() == with_call.chosen.tolist() and pair.digest != with_call.digest
            first = with_call.chosen_mask.tolist().index(False)
            assert pair.chosen_mask.tolist() == [False] * first + with_call.chosen_mask.tolist()[first:]

    def test_conversations_may_differ_from_a_user_turn_on(self, build):
        why, how = ({"role": "user", "content": text} for text in ("Why?", "How?"))
        row = {"chosen": [USER, RIGHT, why, RIGHT], "rejected": [USER, RIGHT, how, RIGHT]}
        (pair,) = build([row])[0]
        assert pair.prompt.tolist() + pair.chosen.tolist() == rendered(build, row["chosen"])[:-1]
        unscored = pair.chosen[~pair.chosen_mask].tolist()
        assert "Why?" in load_tokenizer(build.tokenizer_path).decode(unscored)
        assert pair.chosen_mask.tolist()[-1] and "The second" not in load_tokenizer(build.tokenizer_path).decode(
            unscored
        )

    def test_tools_and_reasoning_are_rendered_as_by_transformers(self, build):
        thought = {**RIGHT, "reasoning_content": "Numbers grow."}
        row = {"prompt": [USER], "chosen": [thought], "rejected": [CALL], "tools": [TOOL]}
        (pair,) = build([row])[0]
        assert pair.prompt.tolist() == rendered(build, [USER], tools=[TOOL], add_generation_prompt=True)
        for response, turn in ((pair.chosen, thought), (pair.rejected, CALL)):
            assert pair.prompt.tolist() + response.tolist() == rendered(build, [USER, turn], tools=[TOOL])[:-1]

    def test_text_parts_are_joined(self, build):
        parts = {
            "role": "user",
            "content": [{"type": "text", "text": "Which is "}, {"type": "text", "text": "larger?"}],
        }
        row = {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}
        assert USER["content"] == "Which is larger?"
        assert ids(build([{**row, "prompt": [parts]}])[0][0]) == ids(build([row], cache="b")[0][0])

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            (
                {"chosen": [{**CALL, "weight": 0}, RESULT, {**RIGHT, "weight": 0}]},
                "chosen has no assistant turn that is",
            ),
            ({"chosen": [{**RIGHT, "weight": 0.5}]}, r"chosen[0].weight must be 0 (not scored) or 1 (scored), not 0.5"),
            ({"chosen": [{**RIGHT, "weight": 0, "loss": True}]}, "weight and loss contradict each other; keep one"),
            ({"chosen": [{**RIGHT, "content": [{"type": "image"}]}]}, "has a part of type 'image'; only text parts"),
            ({"chosen": [{**RIGHT, "content": [{"type": "text"}]}]}, "has a part of type 'text' without text"),
            ({"chosen": [{**CALL, "tool_calls": "larger"}]}, "chosen[0].tool_calls must be a list, not text"),
            ({"prompt": [{**USER, "tool_calls": [1]}]}, "only an assistant turn can have this field, not a user turn"),
            ({"chosen": [USER, RESULT, RIGHT]}, "found tool after user"),
            ({"prompt": [USER, {"role": "developer", "content": "a"}, USER]}, "a developer turn after the first turn"),
        ],
    )
    def test_unusable_turns_are_refused(self, row, says, build):
        with pytest.raises(DataError) as caught:
            build([{"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG], **row}])
        assert says in str(caught.value)

    def test_turns_that_change_with_later_turns_are_refused(self, build, tmp_path):
        template = AGENT.replace(
            "{{ m.content }}<|im_end|>{% endif %}", "{{ m.content }}{{ messages | length }}{% endif %}"
        )
        with pytest.raises(DataError, match="turn 1 of chosen cannot be scored: the chat template renders it diff"):
            build([self.ROW], tokenizer=own_template(build, tmp_path, template))

    def test_all_tokens_can_be_scored(self, build):
        row = {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}
        (usual,), (pair,) = build([row])[0], build([row], cache="all", score="all")[0]
        assert len(pair.prompt) == 1 and pair.chosen_mask is None
        assert pair.prompt.tolist() + pair.chosen.tolist() == usual.prompt.tolist() + usual.chosen.tolist()
        with pytest.raises(DataError, match="a turn has weight 0, but data.score=all scores all turns"):
            build([{**row, "chosen": [{**CALL, "weight": 0}, RESULT, RIGHT]}], score="all")
        with pytest.raises(DataError, match="a turn has weight 0, but data.score=all scores all turns"):
            build([{**row, "prompt": [USER, {**RIGHT, "weight": 0}, USER]}], score="all")


class TestTemplateFaults:
    ROW = {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}
    CUTS_THOUGHTS = CHATML.replace("message.content }}", "message.content.split('</think>')[-1] }}")

    @pytest.mark.parametrize(
        ("template", "row", "says", "kind"),
        [
            (
                CUTS_THOUGHTS,
                {"chosen": [{**RIGHT, "content": "<think>\nIt grows.\n</think>\n\nThe second."}]},
                "drops text of chosen: '<think>\\nIt grows.",
                "drops text of a response",
            ),
            (
                CHATML.replace(
                    "{% for", "{% set messages = messages | rejectattr('role', 'equalto', 'system') %}{% for"
                ),
                {"prompt": [SYSTEM, USER]},
                "drops or moves text of prompt: 'Be brief.'",
                "drops text of the prompt",
            ),
            (
                CHATML,
                {"chosen": [{**CALL, "content": "The second."}]},
                "drops text of chosen: 'compare'",
                "drops text of a response",
            ),
            (CHATML, {"tools": [TOOL]}, "drops tools: compare", "drops tools"),
            (
                CHATML,
                {"chosen": [{**RIGHT, "reasoning_details": [{"type": "reasoning.text", "text": "It grows."}]}]},
                "drops text of chosen: 'It grows.'",
                "drops text of a response",
            ),
            (
                CHATML,
                {"prompt": [{**SYSTEM, "functions": "compare(a, b)"}, USER]},
                "drops or moves text of prompt: 'compare(a, b)'",
                "drops text of the prompt",
            ),
            (
                CHATML.partition("{% if add_gen")[0],
                {},
                "has no generation prompt with '<|im_start|>assistant', so this header would be scored in responses",
                "has no generation prompt with the role header, so each response begins with the header",
            ),
        ],
    )
    def test_fault_ends_the_run_or_is_counted(self, template, row, says, kind, build, tmp_path):
        tokenizer = own_template(build, tmp_path, template)
        row = {**self.ROW, **row}
        with pytest.raises(DataError) as caught:
            build([row], tokenizer=tokenizer, on_bad_line="skip")
        assert f"0.jsonl:1: the chat template {says}" in str(caught.value)
        assert str(caught.value).endswith("or set data.on_template_fault=allow")
        dataset, report = build([row], tokenizer=tokenizer, on_template_fault="allow")
        assert report.faults == {kind: 1} and len(dataset) == 1
        assert f"1 pair: the chat template {kind}" in str(report)

    def test_fields_that_the_template_reads_are_no_fault(self, build, tmp_path):
        template = CHATML.replace(
            "message.content }}", "message.content }}{{ message.functions }}{{ message.thought }}"
        )
        row = {**self.ROW, "prompt": [{**SYSTEM, "functions": "compare(a)"}, USER]}
        row["chosen"] = [{**RIGHT, "thought": "It grows."}]
        tokenizer = own_template(build, tmp_path, template)
        (pair,) = build([row], tokenizer=tokenizer)[0]
        assert "compare(a)" in tokenizer.decode(pair.prompt) and "It grows." in tokenizer.decode(pair.chosen)

    def test_thoughts_of_earlier_turns_are_counted(self, build, tmp_path):
        earlier = {**RIGHT, "content": "<think>\nIt grows.\n</think>\n\nThe second."}
        tokenizer = own_template(build, tmp_path, self.CUTS_THOUGHTS)
        _, report = build([{**self.ROW, "prompt": [USER, earlier, USER]}], tokenizer=tokenizer)
        assert "1 pair: the chat template drops text of an earlier assistant turn" in str(report)


class TestEnds:
    """Tests with the tokenizer of a base model, whose EOS is not the token that ends a turn in the chat template."""

    ROW = {"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}

    @pytest.fixture
    def base(self, tmp_path):
        path = byte_level(tmp_path / "base")
        settings = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|bos|>"}))
        return Builder(tmp_path, path)

    @pytest.mark.parametrize(
        ("add_eos", "expected"),
        [
            ("auto", "The second.<|im_end|>"),
            (True, "The second.<|im_end|>"),
            ("always", "The second.<|im_end|>\n<|bos|>"),
            (False, "The second.<|im_end|>\n"),
        ],
    )
    def test_response_ends_where_the_template_ends_it(self, add_eos, expected, base):
        dataset, report = base([self.ROW], add_eos=add_eos)
        assert load_tokenizer(base.tokenizer_path).decode(dataset[0].chosen) == expected
        if add_eos == "auto":
            assert report.ends == {"<|im_end|>": 1} and "responses end with <|im_end|> (1)" in str(report)

    def test_text_still_gets_the_eos(self, base):
        dataset, report = base([GOOD, ALSO_GOOD])
        assert all(part[-1] == 0 for pair in dataset for part in (pair.chosen, pair.rejected))
        assert report.ends == {"<|bos|>": 2}


class TestPublicTemplates:
    """Patterns in public templates that can lead to wrong tokens or to the rejection of good records."""

    ROW = {"prompt": [SYSTEM, USER], "chosen": [RIGHT], "rejected": [WRONG]}

    def test_system_text_only_before_the_last_user_turn(self, build, tmp_path):
        # The template of Mistral 7B v0.3 renders the system text only if the last turn is a user turn. The text is
        # therefore missing if a response follows the prompt.
        template = (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and messages[0].role == 'system' %}"
            "{{ messages[0].content }} {% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
            " {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        )
        with pytest.raises(DataError, match="drops or moves text of prompt: 'Be brief.'"):
            build([self.ROW], tokenizer=own_template(build, tmp_path, template))

    def test_added_tokens_in_the_text_end_no_turn(self, tmp_path):
        path = byte_level(
            tmp_path / "t",
            template="{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
        )
        library = transformers.AutoTokenizer.from_pretrained(path)
        library.add_tokens(["</answer>"])
        library.save_pretrained(path)
        (pair,) = Builder(tmp_path, path)([{**self.ROW, "chosen": [{**RIGHT, "content": "2</answer>"}]}])[0]
        assert pair.chosen[-1] == pair.rejected[-1] == library.eos_token_id

    def test_text_that_is_part_of_the_end_token(self, tmp_path):
        path = byte_level(tmp_path / "base")
        settings = json.loads((path / "tokenizer_config.json").read_text())
        (path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|bos|>"}))
        row = {"prompt": [USER], "chosen": [{**RIGHT, "content": "end"}], "rejected": [{**RIGHT, "content": "m"}]}
        (pair,) = Builder(tmp_path, path)([row])[0]
        for response, text in ((pair.chosen, "end"), (pair.rejected, "m")):
            assert load_tokenizer(path).decode(response) == f"{text}<|im_end|>"

    def test_generation_prompt_of_another_role(self, build, tmp_path):
        template = CHATML.replace("<|im_start|>assistant", "<|im_start|>model")
        with pytest.raises(DataError, match="generation prompt with 'assistant', so this header would be scored in"):
            build([self.ROW], tokenizer=own_template(build, tmp_path, template))

    def test_header_of_another_turn_after_each_response(self, build, tmp_path):
        template = CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
        with pytest.raises(DataError, match=r"writes '<\|im_start\|>assistant' after each response"):
            build([self.ROW], tokenizer=own_template(build, tmp_path, template))

    def test_end_of_a_turn_with_the_name_of_the_role(self, tmp_path):
        template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        path = byte_level(tmp_path / "tags", template=template)
        (pair,) = Builder(tmp_path, path)([self.ROW])[0]
        assert load_tokenizer(path).decode(pair.chosen).startswith(f"{RIGHT['content']}</assistant>")

    def test_lost_arguments_of_a_call_are_refused(self, build, tmp_path):
        written = (
            "message.content }}{% for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}{{ ''"
        )
        path = own_template(build, tmp_path, CHATML.replace("message.content", written))
        call = {"type": "function", "function": {"name": "compare", "arguments": {"expression": "2 > 1"}}}
        row = {**TestTurns.ROW, "chosen": [{**CALL, "tool_calls": [call]}, RESULT, RIGHT]}
        with pytest.raises(DataError, match="drops text of chosen: 'expression'"):
            build([row], tokenizer=path)

    def test_results_of_tools_written_as_json(self, build, tmp_path):
        template = AGENT.replace("{% else %}{{ m.content }}", "{% else %}{{ m.content | tojson }}")
        row = {**TestTurns.ROW, "chosen": [CALL, {**RESULT, "content": '{"result": "2"}'}, RIGHT]}
        assert len(build([row], tokenizer=own_template(build, tmp_path, template))[0]) == 1

    def test_lost_calls_of_the_prompt_are_refused(self, build, tmp_path):
        template = CHATML.replace("message.content }}", "message.content or 'none' }}")
        row = {**self.ROW, "prompt": [USER, CALL, RESULT]}
        with pytest.raises(DataError, match="drops or moves text of prompt: 'compare'"):
            build([row], tokenizer=own_template(build, tmp_path, template))

    def test_empty_reasoning_and_results_are_no_text(self, build):
        row = {**TestTurns.ROW, "chosen": [CALL, {**RESULT, "content": ""}, {**RIGHT, "reasoning_content": ""}]}
        assert len(build([row])[0]) == 1


def test_a_token_without_an_embedding_row_is_refused_where_it_occurs(build):
    tokenizer = load_tokenizer(build.tokenizer_path)
    tokenizer.rows = tokenizer.eos_id  # the EOS is the first token without a row
    with pytest.raises(DataError, match=r"token '\S+' \(\d+\) is not in the model's embedding, which has 2"):
        build([GOOD], tokenizer=tokenizer)


class TestDate:
    DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML

    def test_date_of_a_template_is_fixed(self, build, tmp_path):
        import datetime

        path, date = own_template(build, tmp_path, self.DATED).template_file, datetime.date(2024, 7, 26)
        rows = [{"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}]
        fixed = load_tokenizer(build.tokenizer_path, path, date)
        assert fixed.decode(build(rows, tokenizer=fixed)[0][0].prompt).startswith("26 Jul 2024<|im_start|>")
        chat_template_utils._compile_jinja_template.cache_clear()  # as in a new process
        sent = pickle.loads(pickle.dumps(fixed))
        assert sent.chat([USER], add_generation_prompt=True).startswith("26 Jul 2024<|im_start|>")
        other = load_tokenizer(build.tokenizer_path, path, datetime.date(2024, 7, 27))
        assert other.digest != fixed.digest and other.content != fixed.content
        plain = load_tokenizer(build.tokenizer_path, None, date)
        assert plain.date is None and plain.digest == load_tokenizer(build.tokenizer_path).digest


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("weight", [1, 0])
def test_eos_is_scored_with_the_last_turn(build, tmp_path, end, weight):
    template = "{% for m in messages %}### {{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
    tokenizer = own_template(build, tmp_path, template + "{% if add_generation_prompt %}### assistant: {% endif %}")
    last = [{"role": "assistant", "content": text, "weight": weight} for text in ("the second", "the third")]
    row = {"prompt": [USER], "chosen": [RIGHT, USER, last[0]], "rejected": [WRONG, USER, last[1]]}
    pair = build([row], tokenizer=tokenizer)[0][0]
    assert pair.chosen[-1] == tokenizer.eos_id and pair.chosen_mask[-1] == bool(weight)
    scored = [token for token, kept in zip(pair.chosen, pair.chosen_mask, strict=True) if kept]
    assert tokenizer.decode(scored) == RIGHT["content"] + (f" the second{end}<|im_end|>" if weight else "")
