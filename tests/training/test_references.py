"""Tests of the reference: all modes train identically, and stored log-probabilities are computed only once."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dpo_engine.testing.hf_training import sequence_logp
from dpo_engine.testing.ranks import run_ranks
from dpo_engine.verbs.rehearse import CLOCK
from support.small_run import config_of, log_of

LAYOUTS = {
    "one": (1, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
    "cp2 dp2": (4, {"cp": 2}),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}),
}
TIES = ("rewards/accuracies", "displacement/chosen_fell")
CONSTANT = {"lr": 1e-3, "schedule": "constant", "warmup_steps": None}


@pytest.fixture(scope="module")
def policy(tiny_hf):
    return tiny_hf("llama")


@pytest.fixture(scope="module")
def other(tiny_hf):
    """Return a model for the reference. Its weights differ from the policy's."""
    return tiny_hf("llama", rope_theta=10000.0, initializer_range=0.03)


def counted(config, verb="train"):
    """Run the verb ``verb`` on this rank, and count what the verb does.

    Returns a dictionary:
    result     return value of the verb, or the class and text of the error
    said       lines of the report of the verb `reference`
    scored     number of pairs that were scored to store or verify values
    exchanges  number of times that the weights on the device were swapped with those in host memory
    models     number of models that were built
    """
    from dpo_engine.errors import EngineError
    from dpo_engine.scoring.reference import HostWeights
    from dpo_engine.training import engine
    from dpo_engine.training import fill_store as store_filling
    from dpo_engine.training import references as reference_modes
    from dpo_engine.training.interruption import Interruption
    from dpo_engine.verbs.reference import score_reference
    from dpo_engine.verbs.train import train

    counts = {"scored": 0, "exchanges": 0, "models": 0}
    score_pairs, exchange, build = store_filling.score_pairs, HostWeights.exchange, engine.build_chunks

    def scoring(engine, chunks, pairs, indices):
        counts["scored"] += len(indices)
        return score_pairs(engine, chunks, pairs, indices)

    def exchanging(self):
        counts["exchanges"] += 1
        return exchange(self)

    def building(*args, **kwargs):
        counts["models"] += 1
        return build(*args, **kwargs)

    reference_modes.score_pairs = store_filling.score_pairs = scoring
    HostWeights.exchange, engine.build_chunks = exchanging, building
    said = []
    try:
        with Interruption() as interruption:
            if verb == "train":
                result = train(config, interruption)
            else:
                result = score_reference(config, said.append, interruption)
    except EngineError as error:
        result = type(error).__name__, str(error)
    return {"result": result, "said": said, **counts}


def numbers(folder):
    """Return the metrics of all steps and evaluations, without metrics of time, speed and memory."""
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in log_of(folder)]


def assert_same(folder, expected, rtol=1e-5):
    lines, wanted = numbers(folder), numbers(expected)
    assert len(lines) == len(wanted)
    for line, want in zip(lines, wanted, strict=True):
        if abs(want.get("rewards/margins", 1.0)) < 1e-6:  # all margins are 0 up to rounding, so TIES may differ
            line, want = ({k: v for k, v in one.items() if k not in TIES} for one in (line, want))
        assert line == pytest.approx(want, rel=rtol, abs=rtol)


@pytest.fixture(scope="module")
def resident(files, policy, other, tmp_path_factory):
    """Run two trainings on one rank, both with a resident reference.

    In the training ``same``, the reference has the policy's initial weights. In the training ``other``, the
    reference has the weights of the fixture ``other``.

    Returns a dictionary with the output directory of each training.
    """
    folders = {}
    for name, path in (("same", None), ("other", str(other))):
        folders[name] = tmp_path_factory.mktemp(name)
        sections = {"reference": {"path": path}} if path else {}
        outcome = run_ranks(counted, 1, config=config_of(files, policy, folders[name], optim=CONSTANT, **sections))[0]
        assert outcome["result"]["step"] == 6
    return folders


def cases():
    for mode in ("offloaded", "stored", "dataset"):
        for weights in ("same", "other"):
            for layout in LAYOUTS:
                quick = (mode, weights, layout) in {
                    ("offloaded", "other", "tp2 pp2"),
                    ("dataset", "same", "one"),
                }
                yield pytest.param(mode, weights, layout, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("mode, weights, layout", list(cases()))
def test_all_modes_train_identically(mode, weights, layout, files, policy, other, resident, tmp_path):
    ranks, parallel = LAYOUTS[layout]
    path = {} if weights == "same" else {"path": str(other)}
    if mode == "dataset":
        files = with_columns(files, policy if weights == "same" else other, tmp_path)
    extra = {"offloaded": {"ahead": 2}, "stored": {"verify": 3}, "dataset": {"verify": 4}}[mode]
    config = config_of(
        files, policy, tmp_path / "out", parallel=parallel, optim=CONSTANT, reference={"mode": mode, **path, **extra}
    )
    outcome = run_ranks(counted, ranks, config=config)[0]
    assert outcome["result"]["step"] == 6 and outcome["models"] == 1, "only one model may be built"
    assert_same(tmp_path / "out", resident[weights])
    if mode == "offloaded":
        # The run has six steps, and the reference scores the pairs of two steps at a time. Each of these three
        # scorings needs two exchanges of weights, and so does the evaluation. If the reference's weights differ from
        # the policy's initial weights, loading the reference's weights needs one more exchange.
        assert outcome["exchanges"] == 2 * (3 + 1) + (weights == "other")
    if mode == "stored":
        assert outcome["scored"] == 22 + 7, "each training and held-out pair must be scored once, not once per epoch"
    if mode == "dataset":
        assert outcome["scored"] == 4


def with_columns(files, model, folder):
    """Write copies of the files with additional columns of log-probabilities, computed by transformers.

    Returns ``files`` with the paths of the copies.
    """
    from transformers import AutoModelForCausalLM

    from dpo_engine.config.run import Config
    from dpo_engine.data.tokenize import build_dataset
    from dpo_engine.data.tokenizer import load_tokenizer

    scorer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = load_tokenizer(files["tokenizer"], None)
    made = dict(files)
    for name in ("train", "validation"):
        raw = {
            "model": {"path": str(model)},
            "data": {"train": files[name], "max_length": 64},
            "train": {"output_dir": "x"},
        }
        config = Config.parse(raw)
        pairs, _ = build_dataset(config.data.train, tokenizer, config.data, folder / "cache")
        rows = [json.loads(line) for line in open(files[name], encoding="utf-8")]
        with torch.no_grad():
            for row, pair in zip(rows, pairs, strict=True):
                row["ref_chosen_logps"] = sequence_logp(scorer, pair.prompt, pair.chosen).item()
                row["ref_rejected_logps"] = sequence_logp(scorer, pair.prompt, pair.rejected).item()
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        made[name] = str(path)
    return made


DAMAGES = ["flipped", *(pytest.param(name, marks=pytest.mark.slow) for name in ("truncated", "removed", "foreign"))]


class TestStored:
    """Tests of stored log-probabilities.

    The fixture ``store`` is the directory of a store that the verb `reference` fills on two tensor-parallel ranks.
    """

    @pytest.fixture(scope="class")
    def store(self, files, policy, tmp_path_factory):
        folder = tmp_path_factory.mktemp("store")
        config = self.config(files, policy, folder / "fill", folder, parallel={"tp": 2})
        outcome = run_ranks(counted, 2, config=config, verb="reference")[0]
        assert outcome["scored"] == 29 and outcome["models"] == 1
        assert any("0 of 29 pairs are in" in line for line in outcome["said"])
        tables = [pa.ipc.open_file(path.read_bytes()).read_all() for path in folder.glob("*/0*.arrow")]
        assert sum(map(len, tables)) == 29, "each pair must be stored once, and no dummy may be stored"
        return folder

    def config(self, files, policy, output, store, **sections):
        reference = {"mode": "stored", "store": str(store), "verify": 0, "missing": "error"}
        reference |= sections.pop("reference", {})
        return config_of(files, policy, output, optim=CONSTANT, reference=reference, **sections)

    @pytest.mark.parametrize(
        "ranks, sections",
        [
            (1, {}),
            (2, {"parallel": {"pp": 2}}),
            (1, {"data": {"seed": 5}, "train": {"epochs": 3}}),
            (1, {"data": {"validation": None, "validation_fraction": 0.3}, "loss": {"beta": 0.3}}),
        ],
        ids=["as filled", "pp2", "another order", "a subset"],
    )
    def test_stored_pairs_are_not_scored_again(self, ranks, sections, store, files, policy, tmp_path):
        outcome = run_ranks(counted, ranks, config=self.config(files, policy, tmp_path, store, **sections))[0]
        assert outcome["result"]["step"] >= 4 and outcome["scored"] == 0 and outcome["models"] == 1
        assert outcome["exchanges"] == 0

    def test_refilling_scores_nothing_and_builds_no_model(self, store, files, policy, tmp_path):
        outcome = run_ranks(counted, 1, config=self.config(files, policy, tmp_path, store), verb="reference")[0]
        assert outcome["scored"] == outcome["models"] == 0 and "29 of 29 pairs are in" in outcome["said"][-1]

    def copy(self, store, tmp_path):
        import shutil

        shutil.copytree(store, tmp_path / "copy")
        (folder,) = [path for path in (tmp_path / "copy").iterdir() if path.name.endswith("native")]
        return tmp_path / "copy", folder, sorted(folder.glob("0*.arrow"))

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_rows_are_refused_or_scored_again(self, damage, store, files, policy, resident, tmp_path, capfd):
        copy, folder, segments = self.copy(store, tmp_path)
        victim = segments[0]
        content = bytearray(victim.read_bytes())
        if damage == "truncated":
            victim.write_bytes(content[:-9])
        elif damage == "flipped":
            content[len(content) // 2] ^= 16
            victim.write_bytes(content)
        elif damage == "removed":
            victim.unlink()
        else:
            for segment in segments:
                segment.unlink()
            from dpo_engine.scoring.store import Numerics, ReferenceStore

            theirs = ReferenceStore(tmp_path, Numerics("f" * 32, "float32", "native"))
            path = theirs.append(np.ones((2, 2), dtype=np.int64), np.ones((2, 4), dtype=np.float32))
            (folder / path.name).write_bytes(path.read_bytes())
        outcome = run_ranks(counted, 1, config=self.config(files, policy, tmp_path / "a", copy))[0]
        kind, text = outcome["result"]
        assert kind == "DataError" and "of 29 pairs have no stored log-probabilities" in text
        expected = {"removed": "", "foreign": "belongs to another reference"}.get(damage, "is damaged")
        assert expected in text
        config = self.config(files, policy, tmp_path / "b", copy, reference={"missing": "score"})
        outcome = run_ranks(counted, 1, config=config)[0]
        lost = {"removed": 22, "truncated": 22, "flipped": 22, "foreign": 29}[damage]
        assert outcome["scored"] == lost, "only the lost rows may be scored again"
        assert expected in capfd.readouterr().out, "the run must report the segment that it ignored"
        assert_same(tmp_path / "b", resident["same"])
        again = run_ranks(counted, 1, config=self.config(files, policy, tmp_path / "c", copy))[0]
        assert again["scored"] == 0 and again["result"]["step"] == 6

    def test_stored_values_are_those_of_the_reference(self, files, policy, other, resident, tmp_path):
        """The stored values and the store's key are those of the reference, not those of the policy."""
        for reference, verb in (({"path": str(other)}, "reference"), ({"path": str(other), "verify": 3}, "train")):
            config = self.config(files, policy, tmp_path / "out", tmp_path / "store", reference=reference)
            outcome = run_ranks(counted, 1, config=config, verb=verb)[0]
        assert outcome["scored"] == 3
        assert_same(tmp_path / "out", resident["other"])
        config = self.config(files, policy, tmp_path / "own", tmp_path / "store")
        assert "29 of 29 pairs have no stored" in run_ranks(counted, 1, config=config)[0]["result"][1]

    def test_pair_in_several_files_is_scored_once(self, files, policy, tmp_path):
        rows = open(files["train"], encoding="utf-8").readlines()
        (tmp_path / "twice.jsonl").write_text("".join(rows + rows[:9]), encoding="utf-8")
        files = {**files, "train": str(tmp_path / "twice.jsonl"), "validation": files["train"]}
        config = self.config(files, policy, tmp_path / "out", tmp_path, reference={"missing": "score"})
        outcome = run_ranks(counted, 1, config=config)[0]
        assert outcome["scored"] == 22 and outcome["result"]["step"] == 8

    def test_weights_with_non_finite_logps_are_refused(self, files, policy, tmp_path):
        import shutil

        from safetensors.torch import load_file, save_file

        shutil.copytree(policy, tmp_path / "model")
        tensors = load_file(tmp_path / "model/model.safetensors")
        tensors["model.norm.weight"].fill_(3e38)  # finite, but the forward pass overflows
        save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
        config = self.config(files, tmp_path / "model", tmp_path / "out", tmp_path / "store")
        kind, text = run_ranks(counted, 1, config=config, verb="reference")[0]["result"]
        assert kind == "NumbersError" and "has log-probabilities [nan, nan" in text and "they must be finite" in text
        assert not list((tmp_path / "store").glob("*/0*.arrow"))

    def test_all_ranks_exit_if_the_first_cannot_read(self, files, policy, tmp_path):
        (tmp_path / "store").write_text("")
        config = self.config(files, policy, tmp_path / "out", tmp_path / "store")
        outcomes = run_ranks(counted, 2, config=config, verb="reference", timeout_s=60)
        assert all("cannot be read (Not a directory)" in outcome["result"][1] for outcome in outcomes)

    def test_store_that_cannot_be_read_back_is_refused(self, files, policy, tmp_path):
        config = self.config(files, policy, tmp_path / "out", tmp_path / "store")
        kind, text = run_ranks(forgetful_filling, 2, config=config)[0]["result"]
        assert (
            kind == "DataError" and "values that were just written cannot be read; set another reference.store" in text
        )

    def test_changed_weights_find_no_stored_values(self, store, files, policy, tmp_path):
        import shutil

        from safetensors.torch import load_file, save_file

        changed = tmp_path / "model"
        shutil.copytree(policy, changed)
        tensors = load_file(changed / "model.safetensors")
        tensors["model.norm.weight"][0] += 1e-3
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        outcome = run_ranks(counted, 1, config=self.config(files, changed, tmp_path / "out", store))[0]
        assert outcome["result"][0] == "DataError" and "29 of 29 pairs have no stored" in outcome["result"][1]

    def test_copied_weights_find_all_stored_values(self, store, files, policy, tmp_path):
        import shutil

        shutil.copytree(policy, tmp_path / "model")
        outcome = run_ranks(counted, 1, config=self.config(files, tmp_path / "model", tmp_path / "out", store))[0]
        assert outcome["result"]["step"] == 6 and outcome["scored"] == 0

    def test_verification_finds_wrong_values(self, store, files, policy, tmp_path):
        from dpo_engine.scoring.store import Numerics, ReferenceStore

        copy, folder, segments = self.copy(store, tmp_path)
        numerics = Numerics(*folder.name.split("-"))
        table = pa.ipc.open_file(segments[0].read_bytes()).read_all()
        digests = np.frombuffer(table["digest"].combine_chunks().buffers()[1], dtype="<i8").reshape(-1, 2)
        values = np.stack([table[name].to_numpy() for name in table.column_names[1:]], axis=1) - 0.5
        for segment in segments:
            segment.unlink()
        ReferenceStore(copy, numerics).append(digests, values)
        config = self.config(files, policy, tmp_path / "out", copy, reference={"verify": 2, "missing": "score"})
        kind, text = run_ranks(counted, 1, config=config)[0]["result"]
        assert kind == "DataError" and "likely causes: other weights" in text and "a stale store" in text

    def test_first_loss_reveals_a_stale_store(self, store, files, policy, tmp_path):
        from dpo_engine.scoring.store import Numerics, ReferenceStore

        copy, folder, segments = self.copy(store, tmp_path)
        for segment in segments:
            table = pa.ipc.open_file(segment.read_bytes()).read_all()
            digests = np.frombuffer(table["digest"].combine_chunks().buffers()[1], dtype="<i8").reshape(-1, 2)
            values = np.stack([table[name].to_numpy() for name in table.column_names[1:]], axis=1)
            segment.unlink()
            values[:, 0] -= 1.0
            ReferenceStore(copy, Numerics(*folder.name.split("-"))).append(digests, values)
        kind, text = run_ranks(counted, 1, config=self.config(files, policy, tmp_path / "out", copy))[0]["result"]
        assert kind == "NumbersError" and "likely causes: a stale store" in text
        assert float(re.search(r"first rewards/margins=([\d.]+)", text)[1]) == pytest.approx(0.1, abs=1e-5)

    @pytest.mark.parametrize("verb", ["reference", "train"])
    def test_signal_keeps_scored_pairs(self, verb, files, policy, tmp_path):
        config = self.config(files, policy, tmp_path / "out", tmp_path / "store", reference={"missing": "score"})
        outcome = run_ranks(interrupted_filling, 2, config=config, verb=verb)[0]
        assert outcome["result"][0] == "Interrupted" and "stopped; all scored pairs are stored" in outcome["result"][1]
        assert 0 < outcome["scored"] < 29
        rest = run_ranks(counted, 1, config=config, verb="reference")[0]
        assert rest["scored"] == 29 - outcome["scored"]

    def test_verb_needs_the_stored_mode(self, files, policy, tmp_path):
        kind, text = run_ranks(counted, 1, config=config_of(files, policy, tmp_path), verb="reference")[0]["result"]
        assert kind == "ConfigError" and "reference.mode=resident: does not use a store" in text

    @pytest.mark.slow
    def test_concurrent_writers_one_of_them_killed(self, files, policy, tmp_path):
        """Run three jobs at the same time, and kill one of them. The store must have all pairs at the end."""
        config = self.config(files, policy, tmp_path / "out", tmp_path / "store")
        (tmp_path / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
        code = (
            "from dpo_engine.training import fill_store; fill_store.PAIRS_PER_SEGMENT = 2; import sys;"
            "from dpo_engine.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, "reference", str(tmp_path / "run.yaml")]
        jobs = [subprocess.Popen(command) for _ in range(3)]
        while not list((tmp_path / "store").glob("*/0*.arrow")):
            assert jobs[0].poll() is None
        jobs[0].kill()
        assert [job.wait(timeout=240) for job in jobs][1:] == [0, 0]
        outcome = run_ranks(counted, 1, config=self.config(files, policy, tmp_path / "out", tmp_path / "store"))[0]
        assert outcome["result"]["step"] == 6 and outcome["scored"] == 0


def forgetful_filling(config):
    from dpo_engine.scoring.store import ReferenceStore

    ReferenceStore.append = lambda self, digests, values: None
    return counted(config, "reference")


def interrupted_filling(config, verb):
    from dpo_engine.training import fill_store as store_filling

    store_filling.PAIRS_PER_SEGMENT = 5
    add = store_filling._add

    def adding(*args):
        if torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return add(*args)

    store_filling._add = adding
    return counted(config, verb)


class TestFollowing:
    """TR-DPO: a reference that is periodically updated from the policy (`reference.sync_every`)."""

    def config(self, files, policy, output, alpha=0.6, every=2, **sections):
        reference = {"sync_every": every, "sync_alpha": alpha}
        return config_of(files, policy, output, optim=CONSTANT, reference=reference, **sections)

    def test_reference_replaced_each_step_has_zero_margins(self, files, policy, tmp_path):
        often = {"eval_interval": 2, "eval_at_start": True}
        run_ranks(counted, 2, config=self.config(files, policy, tmp_path, 1.0, 1, parallel={"tp": 2}, train=often))
        steps = [line for line in numbers(tmp_path) if "loss" in line]
        evaluations = [line for line in numbers(tmp_path) if "eval/loss" in line]
        assert len(evaluations) == 4 and all(abs(line["eval/rewards/margins"]) < 1e-6 for line in evaluations)
        assert len(steps) == 6 and all(abs(step["rewards/margins"]) < 1e-6 for step in steps)
        assert len({step["logps/chosen"] for step in steps}) == 6

    def test_updated_reference_matches_the_papers_formula(self, files, policy, tmp_path):
        """After two steps, the reference's weights must be 0.6 * the policy's weights + 0.4 * the start weights.

        The expected values are computed with transformers.
        """
        from transformers import AutoModelForCausalLM

        from dpo_engine.data.tokenize import build_dataset
        from dpo_engine.data.tokenizer import load_tokenizer

        config = self.config(files, policy, tmp_path, train={"max_steps": 2})
        run_ranks(counted, 2, config=config)
        start = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        end = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).state_dict()
        mixed = {name: 0.6 * end[name] + 0.4 * weight for name, weight in start.state_dict().items()}
        start.load_state_dict(mixed)
        tokenizer = load_tokenizer(config.tokenizer_path, None)
        pairs, _ = build_dataset(config.data.validation, tokenizer, config.data, config.cache_dir)
        with torch.no_grad():
            for row in pq.read_table(tmp_path / "eval" / "step_00000002.parquet").to_pylist():
                expected = sequence_logp(start, pairs[row["index"]].prompt, pairs[row["index"]].chosen).item()
                assert row["ref_chosen_logps"] == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize(
        "start, parallel",
        [
            pytest.param({"tp": 2}, {"tp": 2}, marks=pytest.mark.slow),
            pytest.param({"cp": 2}, {"tp": 2}, marks=pytest.mark.slow),
            pytest.param({"pp": 2}, {"pp": 2}, marks=pytest.mark.slow),
            pytest.param({"cp": 2}, {"pp": 2}, marks=pytest.mark.slow),
        ],
    )
    def test_resuming_continues_the_updated_reference(self, start, parallel, files, policy, tmp_path):
        ranks, whole, parts = 2, tmp_path / "whole", tmp_path / "parts"
        run_ranks(counted, ranks, config=self.config(files, policy, whole, parallel=parallel))
        for stop, layout in zip((3, 6), (start, parallel), strict=True):
            config = self.config(files, policy, parts, parallel=layout, train={"max_steps": stop})
            assert run_ranks(counted, ranks, config=config)[0]["result"]["step"] == stop
        steps = [[line for line in numbers(folder) if "loss" in line] for folder in (whole, parts)]
        if start == parallel:
            assert steps[1] == steps[0]
        for line, expected in zip(steps[1], steps[0], strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-5)

    def test_changed_schedule_is_refused_on_resume(self, files, policy, tmp_path):
        run_ranks(counted, 1, config=self.config(files, policy, tmp_path, train={"max_steps": 1}))
        for other in ({"alpha": 0.5}, {"every": 3}):
            kind, text = run_ranks(counted, 1, config=self.config(files, policy, tmp_path, **other))[0]["result"]
            assert kind == "CheckpointError" and "reference.sync_" in text


def shift(path, column):
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, column: row[column] - 0.5}) + "\n" for row in rows)


class TestDataset:
    @pytest.mark.parametrize("name, column", [("train", "ref_rejected_logps"), ("validation", "ref_chosen_logps")])
    def test_wrong_columns_are_refused(self, name, column, files, policy, tmp_path):
        spoiled = with_columns(files, policy, tmp_path)
        shift(spoiled[name], column)
        config = config_of(spoiled, policy, tmp_path / "out", reference={"mode": "dataset"})
        kind, text = run_ranks(counted, 1, config=config)[0]["result"]
        assert kind == "DataError" and "data records: log-probabilities of pair" in text and "chat template" in text

    def test_columns_of_an_unavailable_model_can_be_trusted(self, files, policy, other, resident, tmp_path):
        config = config_of(
            with_columns(files, other, tmp_path),
            policy,
            tmp_path / "out",
            optim=CONSTANT,
            reference={"mode": "dataset", "verify": 0},
        )
        assert run_ranks(counted, 1, config=config)[0]["result"]["step"] == 6
        assert_same(tmp_path / "out", resident["other"])

    def test_records_without_the_columns_are_refused(self, files, policy, tmp_path):
        config = config_of(files, policy, tmp_path, reference={"mode": "dataset"})
        kind, text = run_ranks(counted, 1, config=config)[0]["result"]
        assert kind == "DataError" and "reference.mode dataset needs ref_chosen_logps in every record" in text


def dead_gradients(config):
    """Train with a loss whose gradient is always zero."""
    from dpo_engine.objective.losses import LOSSES

    def flat(policy, reference):
        return 0.0 * (policy.chosen - reference.chosen)

    LOSSES.register("flat", at_init=0.0)(flat)
    return counted(config)


def test_stage_without_gradients_stops_the_run(files, policy, tmp_path):
    config = config_of(files, policy, tmp_path, loss={"name": "flat"}, parallel={"pp": 2})
    kind, text = run_ranks(dead_gradients, 2, config=config)[0]["result"]
    assert kind == "NumbersError"
    assert "every gradient of pipeline stage 0 is zero" in text and "of pipeline stage 1 is zero" in text
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def evaluated(config):
    """Evaluate the newest checkpoint with the verb `eval`. On rank 0, return the verb's report."""
    from dpo_engine.verbs.evaluate import evaluate

    return evaluate(config, to=f"{config.train.output_dir}/again.parquet")


@pytest.mark.parametrize(
    "reference",
    [
        {"sync_every": 2},
        pytest.param({"mode": "offloaded"}, marks=pytest.mark.slow),
        pytest.param({"mode": "stored", "verify": 2}, marks=pytest.mark.slow),
    ],
    ids=["following", "offloaded", "stored"],
)
def test_eval_uses_the_runs_reference(reference, files, policy, other, tmp_path):
    config = config_of(files, policy, tmp_path, reference={"path": str(other), **reference}, parallel={"pp": 2})
    run_ranks(counted, 2, config=config)
    run_ranks(evaluated, 2, config=config)
    names = ("eval/step_00000006.parquet", "again.parquet")
    first, again = (pq.read_table(tmp_path / name).to_pydict() for name in names)
    assert first == again and max(map(abs, first["margin"])) > 0.01


def test_zero_gradients_are_allowed_if_policy_and_reference_differ(files, policy, other, tmp_path):
    """Zero gradients can be correct: for example, a hinge loss has zero gradients if all pairs satisfy the margin."""
    sections = {"loss": {"name": "flat"}, "reference": {"path": str(other)}, "train": {"max_steps": 1}}
    outcome = run_ranks(dead_gradients, 1, config=config_of(files, policy, tmp_path, **sections))[0]["result"]
    assert outcome["step"] == 1 and outcome["train"]["grad_norm"] == 0.0
