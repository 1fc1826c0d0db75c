"""Hostile files and overrides.

Each case adds a hostile file or a hostile override to a valid run, and states the expected result of `check`.
"""

import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from support.harm import PICKLE, Payload
from support.malformed import GOOD, dump

DEEP = "[" * 100_000
ANSI = "\x1b]0;owned\x07\x1b[31mred\u202e"
HUGE = "1" + "0" * 5000


class Case(NamedTuple):
    """A hostile file or override.

    plant   function that gets the run's folder, and can put files into the folder. If the function returns a list,
            `check` gets the list as overrides
    code    expected exit code of `check`
    says    text that the line on stderr must contain or, if the code is 0, that stdout must contain
    """

    plant: Callable[[Path], Sequence[str] | None]
    code: int
    says: str


CASES: dict[str, Case] = {}


def case(code: int, says: str):
    """Return a decorator that registers a function as the `plant` of a case.

    The case's name is the function's name, with spaces instead of underscores.
    """

    def keep(plant):
        CASES[plant.__name__.replace("_", " ")] = Case(plant, code, says)
        return plant

    return keep


def rows(folder: Path, *lines: bytes | str, name: str = "pairs.jsonl") -> None:
    """Write a file of one good record, followed by ``lines``."""
    encoded = [dump(GOOD), *(line.encode() if isinstance(line, str) else line for line in lines)]
    (folder / name).write_bytes(b"\n".join(encoded) + b"\n")


def edited(path: Path, **changes) -> None:
    """Set keys of a JSON file. If there is no such file, create the file."""
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def safetensors(header: dict | bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """Build a safetensors file with any header. ``size`` is the header's declared length, which can be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(shape: list, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# Records


@case(3, "pairs.jsonl:2: is nested deeper than 64 levels")
def record_nested_100000_deep(folder):
    rows(folder, '{"prompt": ' + DEEP + "]" * 100_000 + "}")


@case(3, "pairs.jsonl:2: contains a number with too many digits")
def record_with_an_integer_of_5001_digits(folder):
    rows(folder, dump(GOOD)[:-1] + f', "weight": {HUGE}}}'.encode())


@case(3, "pairs.jsonl:2: contains more than 262,144 values")
def record_of_millions_of_lists(folder):
    rows(folder, '{"prompt": [' + "[]," * 5_000_000 + "[]]}")


@case(3, "pairs.jsonl:2: contains more than 262,144 values")
def record_of_millions_of_strings(folder):
    rows(folder, '{"prompt": [' + '"",' * 5_000_000 + '""]}')


@case(3, "occurs twice")
def record_with_the_last_of_many_keys_twice(folder):
    keys = ",".join(f'"{n:06}":1' for n in range(200_000))
    rows(folder, "{" + keys + ',"199999":1}')


@case(3, "pairs.jsonl:2: missing field 'prompt' (found 'promp")
def record_with_many_fields_of_nearly_the_right_name(folder):
    rows(folder, "{" + ",".join(f'"promp{n}":1' for n in range(200_000)) + "}")


@case(3, "pairs.jsonl:2: missing field 'prompt'")
def record_whose_blanks_make_a_regular_expression_hang(folder):
    blanks = " " * 4_000_000
    (folder / "pairs.jsonl").write_bytes(
        b'{"chosen": "a b", "rejected": "a c"}\n'
        + json.dumps({"chosen": f"{blanks}x y1", "rejected": f"z{blanks}x y2"}).encode()
        + b"\n"
        + json.dumps({"chosen": f"a{blanks}x y1", "rejected": f"a{blanks}x y2"}).encode()
    )


@case(3, "pairs.jsonl:1: responses has 100000 items; at most 512 are allowed")
def record_of_100000_ranked_responses(folder):
    row = {"prompt": "a", "responses": [str(n) for n in range(100_000)], "scores": list(range(100_000))}
    (folder / "pairs.jsonl").write_bytes(dump(row))
    return ["data.train=[{path: pairs.jsonl, format: ranked_all}]"]


@case(3, r"unknown role '\x1b]0;owned")
def record_with_a_terminal_sequence(folder):
    rows(folder, json.dumps({"prompt": "a", "chosen": [{"role": ANSI, "content": "b"}], "rejected": []}))
    return ["data.train=[{path: pairs.jsonl, format: messages}]"]


@case(3, r"(found \x1b]0;owned")
def record_with_a_terminal_sequence_for_a_name(folder):
    rows(folder, json.dumps({ANSI: "a", "y" * 10_000: "b"}))


@case(3, "pairs.jsonl.gz:2: the line is longer than 16 MiB")
def record_of_megabytes_that_unpacks_to_a_gigabyte(folder):
    path = folder / "pairs.jsonl.gz"
    with path.open("wb") as stream:
        stream.write(gzip.compress(dump(GOOD) + b"\n"))
        zeros = gzip.compress(bytes(2**26), 1)
        for _ in range(16):
            stream.write(zeros)
    return ["data.train=pairs.jsonl.gz"]


@case(0, "no problems found")
def good_records_before_a_line_that_unpacks_to_gigabytes(folder):
    path = folder / "pairs.jsonl.gz"
    good = b"".join(dump({**GOOD, "prompt": f"Which of {n}?"}) + b"\n" for n in range(20))
    with path.open("wb") as stream:
        stream.write(gzip.compress(good))
        zeros = gzip.compress(bytes(2**26), 1)
        for _ in range(32):
            stream.write(zeros)
    return ["data.train=pairs.jsonl.gz"]


@case(0, "no problems found")
def file_named_by_a_terminal_sequence(folder):
    rows(folder, name=f"{ANSI}.jsonl")
    return [f"data.train={json.dumps(f'{ANSI}.jsonl')}"]


@case(2, r"data.train[0].path=\x1b]0;owned\x07\x1b[31mred\u202e.jsonl: no such file")
def absent_file_named_by_a_terminal_sequence(folder):
    return [f"data.train={json.dumps(f'{ANSI}.jsonl')}"]


@case(3, "pairs.jsonl:1: ")
def pickle_for_records(folder):
    (folder / "pairs.jsonl").write_bytes(PICKLE)


@case(2, "pairs.npy: unsupported file type; use .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet or .arrow")
def array_of_pickled_objects_for_records(folder):
    np.save(folder / "pairs.npy", np.array([Payload()], dtype=object))
    return ["data.train=pairs.npy"]


@case(3, "pairs.parquet: cannot be read as Parquet")
def array_of_pickled_objects_named_parquet(folder):
    np.save(folder / "pairs.npy", np.array([Payload()], dtype=object))
    (folder / "pairs.npy").rename(folder / "pairs.parquet")
    return ["data.train=pairs.parquet"]


@case(0, "no problems found")
def parquet_with_a_pickled_column_type(folder):
    """Old versions of pyarrow unpickle the metadata of this type (CVE-2023-47248)."""
    fields = [pa.field(name, pa.string(), metadata=EXTENSION) for name in GOOD]
    table = pa.Table.from_pylist([GOOD], schema=pa.schema(fields))
    pa.parquet.write_table(table, folder / "pairs.parquet")
    return ["data.train=pairs.parquet"]


EXTENSION = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": PICKLE}


@case(2, "pairs.tar: unsupported file type")
def tar_in_place_of_records(folder):
    (folder / "pairs.tar").write_bytes(tar_slip())
    return ["data.train=pairs.tar"]


@case(3, "pairs.jsonl.gz:1: contains a NUL byte")
def tar_named_jsonl_gz(folder):
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(tar_slip()))
    return ["data.train=pairs.jsonl.gz"]


@case(3, "pairs.parquet: cannot be read as Parquet")
def zip_that_would_write_outside_named_parquet(folder):
    (folder / "pairs.parquet").write_bytes(zip_slip())
    return ["data.train=pairs.parquet"]


def tar_slip() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        found = tarfile.TarInfo("../canary")
        found.size = 5
        archive.addfile(found, io.BytesIO(b"owned"))
    return stream.getvalue()


def zip_slip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("../canary", "owned")
    return stream.getvalue()


# Weights


@case(2, "pytorch_model.bin: pickled weights are refused, because loading them can run code")
def pickle_for_weights(folder):
    (folder / "model/model.safetensors").unlink()
    torch.save(Payload(), folder / "model/pytorch_model.bin")


@case(2, "model.safetensors: pickled weights are refused, because loading them can run code")
def pickle_named_safetensors(folder):
    (folder / "model/model.safetensors").write_bytes(PICKLE)


@case(2, "model.safetensors: pickled weights are refused, because loading them can run code")
def torch_file_named_safetensors(folder):
    torch.save(Payload(), folder / "model/model.safetensors")


@case(0, "no problems found")
def pickles_beside_the_weights(folder):
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "scheduler.pt", "x.npy", "config.pkl"):
        (folder / "model" / name).write_bytes(PICKLE)


@case(2, "model.tar: no such directory")
def tar_for_a_model(folder):
    (folder / "model.tar").write_bytes(tar_slip())
    return ["model.path=model.tar"]


@case(2, "model.zip: no such directory")
def zip_for_a_model(folder):
    (folder / "model.zip").write_bytes(zip_slip())
    return ["model.path=model.zip"]


@case(2, "model.safetensors is damaged (its header would be larger than 16 MiB)")
def header_of_2_to_the_63(folder):
    (folder / "model/model.safetensors").write_bytes(safetensors(b"{}", size=2**63))


@case(2, "model.safetensors is damaged (its header would be larger than 16 MiB)")
def header_of_90_megabytes(folder):
    one = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
    header = (
        b"{" + b"".join(one % n for n in range(1_600_000)) + b'"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    )
    (folder / "model/model.safetensors").write_bytes(safetensors(header))


@case(2, "model.safetensors cannot be read (")
def header_nested_100000_deep(folder):
    (folder / "model/model.safetensors").write_bytes(safetensors(b'{"x":' + DEEP.encode()))


@case(2, "model.safetensors cannot be read (")
def overlapping_tensors(folder):
    header = {"a": entry([4], 0, 16), "b": entry([4], 8, 24)}
    (folder / "model/model.safetensors").write_bytes(safetensors(header, bytes(24)))


@case(2, "model.safetensors cannot be read (")
def tensors_with_a_hole_between(folder):
    header = {"a": entry([4], 0, 16), "b": entry([4], 32, 48)}
    (folder / "model/model.safetensors").write_bytes(safetensors(header, bytes(48)))


@case(2, "model.safetensors cannot be read (")
def tensor_of_a_shape_larger_than_its_bytes(folder):
    (folder / "model/model.safetensors").write_bytes(safetensors({"a": entry([4000], 0, 16)}, bytes(16)))


@case(2, "model.safetensors cannot be read (")
def tensor_of_a_shape_that_overflows(folder):
    header = {"a": entry([2**33, 2**33, 4], 0, 16)}
    (folder / "model/model.safetensors").write_bytes(safetensors(header, bytes(16)))


@case(2, "model.safetensors cannot be read (")
def tensor_of_a_negative_shape(folder):
    (folder / "model/model.safetensors").write_bytes(safetensors({"a": entry([-4], 0, 16)}, bytes(16)))


@case(2, "model.safetensors cannot be read (")
def tensor_that_ends_before_it_starts(folder):
    (folder / "model/model.safetensors").write_bytes(safetensors({"a": entry([4], 16, 0)}, bytes(16)))


@case(2, "model.safetensors cannot be read (")
def tensor_of_a_dtype_that_does_not_fit_its_bytes(folder):
    header = {"a": entry([4], 0, 16, dtype="F64")}
    (folder / "model/model.safetensors").write_bytes(safetensors(header, bytes(16)))


@case(2, "has dtype I32; convert it to bf16, fp16 or fp32")
def tensor_of_a_dtype_of_the_same_size(folder):
    path = folder / "model/model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))


@case(2, r"is not used by a")
def tensor_named_by_a_terminal_sequence(folder):
    path = folder / "model/model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[ANSI * 1000] = entry([0], 0, 0)
    path.write_bytes(safetensors(header, content[8 + length :]))


def index(folder: Path, name: str) -> None:
    (folder / "model/model.safetensors").rename(folder / "model/model-1.safetensors")
    (folder / "model/model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": name, "lm_head.weight": "model-1.safetensors"}})
    )


@case(2, "lists '../outside.safetensors', not a safetensors file in this directory")
def index_that_names_a_file_above(folder):
    index(folder, "../outside.safetensors")


@case(2, "lists '/etc/passwd', not a safetensors file in this directory")
def index_that_names_an_absolute_path(folder):
    index(folder, "/etc/passwd")


@case(2, r"lists '\x1b]0;owned")
def index_that_names_a_terminal_sequence(folder):
    index(folder, ANSI * 1000)


@case(2, "model-2.safetensors: pickled weights are refused")
def index_that_names_a_link_to_a_pickle_outside(folder):
    (folder / "outside.bin").write_bytes(PICKLE)
    (folder / "model/model-2.safetensors").symlink_to("../outside.bin")
    index(folder, "model-2.safetensors")


@case(2, "model.safetensors.index.json cannot be read (is nested deeper than 64 levels)")
def index_nested_100000_deep(folder):
    (folder / "model/model.safetensors.index.json").write_text('{"weight_map": ' + DEEP)


@case(2, "model.safetensors.index.json cannot be read (contains a number with too many digits)")
def index_with_an_integer_of_5001_digits(folder):
    (folder / "model/model.safetensors.index.json").write_text('{"weight_map": ' + HUGE + "}")


@case(2, "model.safetensors.index.json cannot be read (contains more than 262,144 values)")
def index_of_millions_of_values(folder):
    (folder / "model/model.safetensors.index.json").write_text('{"weight_map": [' + "[]," * 8_000_000 + "[]]}")


# config.json


@case(2, "config.json cannot be read (is nested deeper than 64 levels)")
def model_config_nested_100000_deep(folder):
    (folder / "model/config.json").write_text('{"model_type": ' + DEEP)


@case(2, "config.json cannot be read (contains a number with too many digits)")
def model_config_with_an_integer_of_5001_digits(folder):
    text = (folder / "model/config.json").read_text()
    (folder / "model/config.json").write_text(text.replace('"hidden_size": 64', f'"hidden_size": {HUGE}'))


@case(2, "config.json cannot be read (contains more than 262,144 values)")
def model_config_of_millions_of_values(folder):
    (folder / "model/config.json").write_text('{"x": [' + "[]," * 8_000_000 + "[]]}")


@case(2, "config.json cannot be read (is larger than 32 MiB)")
def model_config_without_end(folder):
    (folder / "model/config.json").write_text("{}")
    os.truncate(folder / "model/config.json", 2**33)


@case(2, "num_hidden_layers=10000000000: must be a whole number, at most 16777216")
def model_config_of_ten_billion_layers(folder):
    edited(folder / "model/config.json", num_hidden_layers=10**10)


@case(2, "config.json declares 16000000 layers, but the number of tensors is ")
def model_config_of_sixteen_million_layers(folder):
    edited(folder / "model/config.json", num_hidden_layers=16_000_000)


@case(2, r"unknown model family '\x1b]0;owned")
def model_config_of_a_family_named_by_a_terminal_sequence(folder):
    edited(folder / "model/config.json", model_type=ANSI * 1000)


@case(0, "no problems found")
def model_config_with_code_of_its_own(folder):
    code(folder / "model/modeling_evil.py")
    names = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    edited(folder / "model/config.json", auto_map=names, _attn_implementation="evil/kernel")


# Tokenizers


def code(path: Path) -> None:
    path.write_text("import os\nos.mkdir('canary')\nclass Evil: pass\n")


BYTES = ["model.tokenizer=tok"]


@case(2, "auto_map names custom code, which is never run")
def tokenizer_that_is_code_of_its_own(folder):
    code(folder / "tok/evil.py")
    edited(
        folder / "tok/tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]}
    )
    return BYTES


@case(0, "no problems found")
def tokenizer_with_pickles_beside_it(folder):
    for name in ("vocab.pkl", "tokenizer.pkl", "vocab.bin", "tokenizer.npy"):
        (folder / "tok" / name).write_bytes(PICKLE)
    return BYTES


@case(2, "model.tokenizer=tok: ")
def tokenizer_of_pickles_only(folder):
    for path in (folder / "tok").iterdir():
        path.write_bytes(PICKLE) if path.name == "tokenizer.json" else path.unlink()
    (folder / "tok/tokenizer.json").rename(folder / "tok/vocab.pkl")
    return BYTES


@case(2, "cannot be loaded by transformers")
def tokenizer_json_that_is_a_pickle(folder):
    (folder / "tok/tokenizer.json").write_bytes(PICKLE)
    return BYTES


@case(2, "tok.model: not a sentencepiece model")
def sentencepiece_model_that_is_a_pickle(folder):
    (folder / "tok.model").write_bytes(PICKLE)


@case(2, "cannot be loaded by transformers")
def tokenizer_json_nested_100000_deep(folder):
    (folder / "tok/tokenizer.json").write_text('{"model": ' + DEEP)
    return BYTES


@case(2, "tokenizer_config.json cannot be read (is nested deeper than 64 levels)")
def tokenizer_config_nested_100000_deep(folder):
    (folder / "tok/tokenizer_config.json").write_text('{"x": ' + DEEP)
    return BYTES


@case(2, "tokenizer_config.json cannot be read (contains a number with too many digits)")
def tokenizer_config_with_an_integer_of_5001_digits(folder):
    (folder / "tok/tokenizer_config.json").write_text(f'{{"model_max_length": {HUGE}}}')
    return BYTES


@case(0, "no problems found")
def tokenizer_config_that_names_files_elsewhere(folder):
    for name in ("tokenizer_file", "vocab_file", "merges_file", "chat_template_file"):
        edited(folder / "tok/tokenizer_config.json", **{name: "/etc/passwd"})
    return BYTES


def template(folder: Path, text: str) -> list[str]:
    (folder / "chat.jinja").write_text(text)
    talk = {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}
    (folder / "pairs.jsonl").write_bytes(dump(talk))
    return ["data.chat_template=chat.jinja"]


@case(2, "data.chat_template=chat.jinja: performs a forbidden operation (")
def template_that_leaves_its_sandbox(folder):
    return template(folder, "{{ ''.__class__.__mro__[1].__subclasses__() }}")


@case(2, "data.chat_template=chat.jinja: performs a forbidden operation (")
def template_that_calls_the_system(folder):
    return template(folder, "{{ cycler.__init__.__globals__.os.mkdir('canary') }}")


@case(2, "data.chat_template=chat.jinja: performs a forbidden operation (Range too big")
def template_that_loops_a_billion_times(folder):
    return template(folder, "{% for i in range(10**9) %}x{% endfor %}")


@case(2, "data.chat_template=chat.jinja: takes more than 2 s for one conversation")
def template_of_nested_loops(folder):
    loops = "{% for i in range(99999) %}" * 3
    return template(folder, loops + "{{ messages[0].content }}" + "{% endfor %}" * 3)


@case(3, "the chat template rejects this conversation: ")
def template_that_reads_a_file(folder):
    return template(folder, "{% include '/etc/passwd' %}")


@case(3, "the chat template rejects this conversation: integer division or modulo by zero")
def template_that_divides_by_zero(folder):
    return template(folder, "{{ 1 // 0 }}")


@case(2, "chat.jinja: cannot be read")
def template_that_is_a_pickle(folder):
    template(folder, "")
    (folder / "chat.jinja").write_bytes(PICKLE)
    return ["data.chat_template=chat.jinja"]


# The run file


def run_file(folder: Path, text: str) -> None:
    with (folder / "run.yaml").open("a") as stream:
        stream.write(text)


@case(2, "is not valid YAML (could not determine a constructor for the tag")
def run_file_that_calls_the_system(folder):
    run_file(folder, "plugins: [!!python/object/apply:os.mkdir [canary]]\n")


@case(2, "is not valid YAML (could not determine a constructor for the tag")
def run_file_that_makes_an_object(folder):
    run_file(folder, "plugins: !!python/object:harm.Payload {}\n")


@case(2, "is not valid YAML (aliases expand to more than 200,000 values)")
def run_file_of_a_billion_laughs(folder):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    run_file(folder, "\n".join(lines) + "\n")


@case(2, "is not valid YAML (aliases expand to more than 200,000 values)")
def run_file_of_a_billion_merged_keys(folder):
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 10)]
    run_file(folder, "\n".join(lines) + "\n")


@case(2, "is not valid YAML (nested deeper than 64 levels)")
def run_file_nested_100000_deep(folder):
    run_file(folder, "plugins: " + DEEP + "\n")


@case(2, "is not valid YAML (nested deeper than 64 levels)")
def run_file_nested_deep_by_aliases(folder):
    run_file(folder, "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000)))


@case(2, "is not valid YAML (a number with 5,001 digits, more than 100)")
def run_file_with_an_integer_of_5001_digits(folder):
    run_file(folder, f"plugins: {HUGE}\n")


@case(2, "is not valid YAML (a number with ")
def run_file_with_a_hexadecimal_integer_of_100000_digits(folder):
    run_file(folder, f"plugins: 0x{'f' * 100_000}\n")


@case(2, "run.yaml: is larger than 256 KiB")
def run_file_of_8_gigabytes(folder):
    os.truncate(folder / "run.yaml", 2**33)


@case(2, "train.output_dir=a\\x00b: must be text without a NUL character")
def run_file_with_a_nul_in_a_path(folder):
    return ['train.output_dir="a\\0b"']


@case(2, r"optim.lr=\x1b]0;owned\x07\x1b[31mred\u202e: must be a number")
def run_file_with_a_terminal_sequence(folder):
    return [f"optim.lr={json.dumps(ANSI)}"]


@case(2, "plugins:1: is not valid YAML (aliases expand to more than 200,000 values)")
def override_of_a_billion_laughs(folder):
    inner = "&a0 [x, x, x, x, x, x, x, x, x, x]"
    lines = [inner] + [f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return ["plugins=[" + ", ".join(lines) + "]"]
