"""Create the quickstart's task: preference pairs, a sentencepiece tokenizer and a small Llama checkpoint.

    python examples/quickstart/make_task.py --out runs/quickstart/task

This command writes ``train.jsonl`` and ``held_out.jsonl`` (prompt, chosen, rejected), and ``base/``, which contains a
Hugging Face checkpoint and its tokenizer. The checkpoint answers every question in the right format, but half of its
answers are wrong, because its warm-up used an equal number of right and wrong answers. The output depends only on the
options, the source code and the versions of the libraries. If a task with the same options and source code already
exists, nothing is written.
"""

import argparse
import hashlib
import io
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
from task import Question, stream, take
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from transformers.utils import logging

VOCAB_SIZE = 80
IGNORED = -100  # the label that torch's cross-entropy ignores


def train_tokenizer(questions: list[Question]) -> bytes:
    """Train a byte-pair sentencepiece model on the questions, and return the bytes of its ``.model`` file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{question.prompt} {question.right} {question.wrong}" for question in questions]),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        normalization_rule_name="identity",  # expected by transformers' LlamaTokenizer, which also reads this file
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def collate(questions: list[Question], tokenizer: sentencepiece.SentencePieceProcessor) -> dict[str, torch.Tensor]:
    """Return a batch with two rows per question, one for each answer. Only the answer and the end token get labels.

    Returns input_ids and labels [2q, s], right-padded with the end-of-sequence token.
    """
    rows = []
    for question in questions:
        prompt = tokenizer.encode(question.prompt)
        for answer in (question.right, question.wrong):
            response = [*tokenizer.encode(answer), tokenizer.eos_id()]
            rows.append((prompt + response, [IGNORED] * len(prompt) + response))
    width = max(len(ids) for ids, _ in rows)
    input_ids = [ids + [tokenizer.eos_id()] * (width - len(ids)) for ids, _ in rows]
    labels = [row + [IGNORED] * (width - len(row)) for _, row in rows]
    return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels)}


def warm_up(
    questions: Iterator[Question], tokenizer: sentencepiece.SentencePieceProcessor, *, seed: int, steps: int
) -> LlamaForCausalLM:
    """Train a small Llama to give right and wrong answers equally often. Each of the ``steps`` has 48 questions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_id(),
        eos_token_id=tokenizer.eos_id(),
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, 1) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    started = time.monotonic()
    for step in range(1, steps + 1):
        loss = model(**collate(list(islice(questions, 48)), tokenizer)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps:
            elapsed = time.monotonic() - started
            print(f"  warm-up {step}/{steps}: loss {loss.item():.3f} nats per token, {elapsed:.0f} s", flush=True)
    return model


def write_pairs(path: Path, questions: list[Question]) -> None:
    """Write one JSON object per line, with the right answer as the chosen one.

    The engine puts nothing between a prompt and its response, so each response starts with a space.
    """
    rows = ({"prompt": pair.prompt, "chosen": f" {pair.right}", "rejected": f" {pair.wrong}"} for pair in questions)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make(directory: Path, *, seed: int, pairs: int, held_out: int, steps: int) -> None:
    """Write the whole task below ``directory``, which must not exist."""
    held_out_questions = take(stream(random.Random(f"held-out {seed}"), without=set()), held_out)
    held_out_items = {question.items for question in held_out_questions}
    train_questions = take(stream(random.Random(f"train {seed}"), without=held_out_items), pairs)

    base = directory / "base"
    base.mkdir(parents=True)
    (base / "tokenizer.model").write_bytes(train_tokenizer(train_questions))
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    LlamaTokenizer.from_pretrained(base).save_pretrained(base)

    warm_up_questions = stream(random.Random(f"warm-up {seed}"), without=held_out_items)
    warm_up(warm_up_questions, tokenizer, seed=seed, steps=steps).save_pretrained(base)
    write_pairs(directory / "train.jsonl", train_questions)
    write_pairs(directory / "held_out.jsonl", held_out_questions)


def main() -> None:
    """Create the task, unless the same task already exists. Delete the unfinished files of an interrupted call."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to create, or to replace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=2400, help="number of training pairs")
    parser.add_argument("--held-out", type=int, default=255, help="number of held-out pairs")
    parser.add_argument("--warm-up", type=int, default=700, help="number of supervised warm-up steps")
    options = parser.parse_args()
    logging.disable_progress_bar()

    made_of = hashlib.sha256(repr(sorted((key, str(value)) for key, value in vars(options).items())).encode())
    for source in ("make_task.py", "task.py"):
        made_of.update(Path(__file__).with_name(source).read_bytes())
    stamp = options.out / "made_of"
    if stamp.is_file() and stamp.read_text() == made_of.hexdigest():
        print(f"{options.out}: already exists")
        return
    print("creating pairs, a tokenizer and a checkpoint with 50% wrong answers; this takes about 30 s", flush=True)
    partial = options.out.with_name(options.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    make(partial, seed=options.seed, pairs=options.pairs, held_out=options.held_out, steps=options.warm_up)
    (partial / "made_of").write_text(made_of.hexdigest())
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)
    print(f"{options.out}: {options.pairs} training pairs, {options.held_out} held-out pairs, checkpoint in base/")


if __name__ == "__main__":
    main()
