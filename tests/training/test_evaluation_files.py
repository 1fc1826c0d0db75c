"""Tests of the files that a training run writes at every evaluation: pairs, summaries, tokens, and the page."""

import json

import pytest

from dpo_engine.reporting.pair_file import read_evaluation
from dpo_engine.reporting.token_file import read_tokens
from dpo_engine.testing.ranks import run_ranks
from support.small_run import config_of, run

LOGGING = {"page": True, "token_samples": 3, "progress": "plain"}


def train_watched(config):
    """Train. Return the run's summary, and a list with an entry for each time that the page was written.

    An entry has the names of the files in eval/, and the beginning of the page.
    """
    from dpo_engine.training import evaluation_files

    seen = []
    write = evaluation_files.write_page

    def watched(directories, to):
        write(directories, to)
        seen.append((sorted(path.name for path in (directories[0] / "eval").iterdir()), to.read_text()[:15]))

    evaluation_files.write_page = watched
    return run(config), seen


def test_every_evaluation_is_written_and_shown(files, tiny_hf, tmp_path, capfd):  # noqa: F811
    config = config_of(
        files,
        tiny_hf("llama", num_hidden_layers=2),
        tmp_path,
        parallel={"pp": 2},
        train={"max_steps": 2, "eval_interval": 1, "eval_at_start": True},
        checkpoint={"export": False},
        logging=LOGGING,
    )
    summary, seen = run_ranks(train_watched, 2, config=config)[0]
    names = [[f"step_{step:08d}{end}" for end in (".json", ".parquet", ".tokens.parquet")] for step in range(3)]
    assert [files for files, _ in seen] == [names[0], names[0] + names[1], sum(names, []), sum(names, [])]
    assert {start for _, start in seen} == {"<!doctype html>"}
    assert f"page: {tmp_path}/report.html, written at every evaluation\n" in capfd.readouterr().out
    for step in range(3):
        path = tmp_path / f"eval/step_{step:08d}.parquet"
        found, (texts, facts) = read_evaluation(path), read_tokens(path.with_suffix(".tokens.parquet"))
        assert found.facts["step"] == facts["step"] == step and len(texts) == 9
        told = json.loads(path.with_suffix(".json").read_text())["groups"][0]
        assert told["margin"]["mean"] == pytest.approx(found.columns["margin"].mean(), abs=1e-9)
        for text in texts:
            if text.side != "prompt":
                assert sum(text.logps) == pytest.approx(found.columns[f"{text.side}_logps"][text.index], rel=1e-5)
                start = sum(text.ref_logps)
                assert start == pytest.approx(found.columns[f"ref_{text.side}_logps"][text.index], rel=1e-5)
    assert summary["eval"]["loss"] == pytest.approx(read_evaluation(path).columns["loss"].mean(), rel=1e-6)


@pytest.mark.parametrize("sections", [{"reference": {"mode": "offloaded"}}, {"adapter": {"rank": 4}}])
def test_references_that_share_the_policys_memory(sections, files, tiny_hf, tmp_path):  # noqa: F811
    """The reference log-probabilities of a response's tokens must not be those of the trained policy.

    The sum of the tokens' reference log-probabilities equals the reference's log-probability of the response. The
    policy's log-probability of the response is different.
    """
    config = config_of(
        files,
        tiny_hf("llama", num_hidden_layers=1),
        tmp_path,
        optim={"lr": 1e-2},
        train={"max_steps": 2},
        checkpoint={"export": False},
        logging=LOGGING | {"page": False},
        **sections,
    )
    (summary,) = run_ranks(run, 1, config=config)
    assert summary["step"] == 2, summary
    path = tmp_path / "eval/step_00000002.parquet"
    columns, (texts, _) = read_evaluation(path).columns, read_tokens(path.with_suffix(".tokens.parquet"))
    for text in texts:
        if text.side != "prompt":
            policy, reference = (columns[f"{part}{text.side}_logps"][text.index] for part in ("", "ref_"))
            assert sum(text.logps) == pytest.approx(policy, rel=1e-5)
            assert sum(text.ref_logps) == pytest.approx(reference, rel=1e-5) and abs(policy - reference) > 1e-3


def train_without_plotly(config):
    from dpo_engine.training import evaluation_files

    evaluation_files.find_spec = lambda name: None
    return run(config)


def train_with_a_full_disk(config):
    from dpo_engine.errors import ConfigError
    from dpo_engine.training import evaluation_files, token_samples

    def fail(path, *rest):
        raise ConfigError(f"{path}: cannot be written (No space left on device); choose another path")

    evaluation_files.write_page = lambda directories, to: fail(to)
    evaluation_files.write_json = token_samples.write_tokens = fail
    return run(config)


@pytest.mark.parametrize("case", [pytest.param("nothing asked", marks=pytest.mark.slow), "without plotly", "full disk"])
def test_a_run_ends_normally_if_files_are_not_written(case, files, tiny_hf, tmp_path, capfd):  # noqa: F811
    logging = LOGGING | ({"page": False, "token_samples": 0} if case == "nothing asked" else {})
    config = config_of(
        files,
        tiny_hf("llama", num_hidden_layers=1),
        tmp_path,
        train={"max_steps": 2, "eval_interval": 1},
        checkpoint={"export": False},
        logging=logging,
    )
    how = {"without plotly": train_without_plotly, "full disk": train_with_a_full_disk}.get(case, run)
    (summary,) = run_ranks(how, 1, config=config)
    assert summary["step"] == 2 and (tmp_path / "eval/step_00000002.parquet").exists()
    out = capfd.readouterr().out
    assert not (tmp_path / "report.html").exists()
    written = sorted(path.name for path in (tmp_path / "eval").iterdir())
    if case == "nothing asked":
        assert written == ["step_00000002.parquet"] and "page" not in out
    elif case == "without plotly":
        way_out = "pip install 'dpo-engine[report]', or set logging.page=false"
        says = f"page: not written, because plotly is missing; {way_out}\n"
        assert says in out and len(written) == 6
    else:
        for what in ("writing the page: ", "tokens: ", f"writing {tmp_path}/eval/step_00000001.parquet: "):
            assert f"\n{what}" in out, what
        assert out.count("(No space left on device); choose another path; the run continues\n") == 7
