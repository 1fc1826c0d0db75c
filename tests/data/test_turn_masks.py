"""Tests of other systems' masks that exclude turns from the loss.

A mask keeps its meaning, or is refused with an error that names the mask's field.
"""

import pytest

from dpo_engine.data.formats import FORMATS, BadRecord, checked

ASK = {"role": "user", "content": "Which is larger?"}
LOOK = {"role": "assistant", "content": "Let me see."}
MORE = {"role": "user", "content": "Well?"}
SAID = {"role": "assistant", "content": "The second."}
OTHER = {"role": "assistant", "content": "The first."}

NOT_SCORED = [
    *({name: False} for name in ("train", "training", "trainable", "train_on_turn", "trainOnTurn", "loss", "Training")),
    *(
        {name: 0}
        for name in ("weight", "Weight", "loss_mask", "lossMask", "loss-weight", "step_loss_mask", "loss_scale")
    ),
    {"loss_scale": 0.0},
    {"masked": True},
    {"masked": 1, "train": False},
]
SCORED = [
    *({name: not value for name, value in form.items()} for form in NOT_SCORED),
    {"loss_weight": 1.0, "mask": None},
]


def weights(first, form="messages", **others):
    """Return the weight of each turn of `chosen`.

    first   additional fields of the first turn of `chosen`
    others  additional fields of the record
    """
    row = {"prompt": [ASK], "chosen": [{**LOOK, **first}, MORE, SAID], "rejected": [OTHER]}
    if form == "sharegpt":
        turns = {name: [{"from": t["role"], "value": t["content"], **t} for t in row[name]] for name in row}
        row = {"chosen": turns["prompt"] + turns["chosen"], "rejected": turns["prompt"] + turns["rejected"]}
    return [turn.get("weight", 1) for turn in checked(FORMATS[form]({**row, **others})).chosen]


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_each_spelling_has_its_own_meaning(form):
    for mask in NOT_SCORED:
        assert weights(mask, form) == [0, 1, 1], mask
    for mask in SCORED:
        assert weights(mask, form) == [1, 1, 1], mask
    swift = {"messages": [ASK, {**LOOK, "loss_scale": 0}, MORE, SAID], "rejected_response": OTHER["content"]}
    assert checked(FORMATS["swift"](swift)).prompt[1]["weight"] == 0
    row = {"prompt": [ASK], "chosen": [{**SAID, "trainable": True}], "rejected": {**OTHER, "masked": False}}
    assert checked(FORMATS["messages"](row)).chosen == SAID["content"]  # the mask is not part of the response


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        *(
            (
                {name: value},
                f"chosen[0].{name} may be a mask, but has no clear meaning; use the field weight (0 or 1) instead",
            )
            for name, value in (
                ("mask", True),
                ("mask", 0),
                ("Masks", [0, 1]),
                ("assistant_mask", [0, 1]),
                ("train_detail", [{"begin_offset": 0, "end_offset": 3, "train": False}]),
                ("token_weights", [0.5]),
                ("lossType", "none"),
                ("ignore", True),
                ("supervised", False),
            )
        ),
        ({"loss_scale": 2.0}, "chosen[0].loss_scale must be 0 (not scored) or 1 (scored), not 2.0"),
        ({"loss_mask": [0, 1]}, "chosen[0].loss_mask must be 0 (not scored) or 1 (scored), not [0, 1]"),
        ({"training": "false"}, "chosen[0].training must be 0 (not scored) or 1 (scored), not false"),
        ({"masked": "yes"}, "chosen[0].masked must be 0 (scored) or 1 (not scored), not yes"),
        ({"masked": True, "weight": 1}, "chosen[0]: masked and weight contradict each other; keep one of them"),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "train": False}]},
            "chosen[0].content has a part that is not scored; only whole turns can have weight 0",
        ),
        ({"videos": ["a.mp4"]}, "chosen[0].videos is not supported"),
        ({"attachments": [{"name": "a.pdf"}]}, "chosen[0].attachments is not supported"),
        ({"image_url": "a.png"}, "chosen[0].image_url is not supported"),
        ({"function_call": {"name": "a"}}, "chosen[0].function_call is not supported"),
    ],
)
def test_masks_without_one_clear_meaning_are_refused_by_name(mask, says):
    with pytest.raises(BadRecord) as caught:
        weights(mask)
    assert str(caught.value) == says


def test_other_fields_of_a_message_reach_the_template():
    harmless = {
        "name": "heron",
        "id": 3,
        "score": 0,
        "weights_of": None,
        "images": [],
        "image": 0,
        "constraint": "none",
    }
    row = {"prompt": [ASK], "chosen": [{**SAID, **harmless}], "rejected": [OTHER]}
    (turn,) = checked(FORMATS["messages"](row)).chosen
    assert turn == {**SAID, "name": "heron", "id": 3, "score": 0, "image": 0, "constraint": "none"}


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ({"loss_weight": 0.5}, r"^loss_weight is not read; set data.columns={weight: loss_weight}, or {loss_weight: n"),
        ({"sampleWeight": 2}, "^sampleWeight is not read; set data.columns={weight: sampleWeight}, or {sampleWeight"),
        (
            {"train": False},
            "^train is false, but the engine does not read this field; remove the record, or set data.columns={train: ",
        ),
        ({"trainable": [True]}, "^trainable is not read; set weight 0 on the turns that must not be scored, or set "),
    ],
)
def test_masks_of_a_whole_record_are_refused_too(field, says):
    with pytest.raises(BadRecord, match=says):
        weights({}, **field)
    harmless = {"loss_weight": 1.0, "train": True, "loss": 0.37, "training": "gsm8k"}
    assert weights({}, **harmless) == [1, 1, 1]
