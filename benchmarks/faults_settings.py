"""Cases of `faults.py`: wrong recipes, options and prompts."""

from __future__ import annotations

import codecs
import gzip
import os
import random
from pathlib import Path
from typing import Any

from faults import Case
from faults_world import EVALUATE, SMALL
from pydantic import BaseModel

from twostep.recipe.schema import Recipe

# Texts that no setting expects, or most do not.
_ODD = [
    "-1", "0", "1", "3", "1e30", "1e-30", "nan", "inf", "-inf", "null", "true", "[]", "{}", "[1,2]",
    "[0,0]", "[1,0]", "abc", "''", "'a\\0b'", "2024-13-45", "99999999999999999999", "1e400", "0x10",
    "'~'", "'*'", "../..", "/proc/self/mem", "/dev/null", "[[[[1]]]]", "'\\e[31m'", "0.5", "-0.0",
    "{a: 1}", "!!python/object:os.system x", "&a [*a]", "'" + "x" * 300 + "'", "1_000", "1:30", "\u202e",
]  # fmt: skip


def _settings(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        inner: Any = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += _settings(inner, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def cases(world: Path, draw: random.Random) -> list[Case]:
    return [*_overrides(draw), *_trained(draw), *_recipes(), *_options(), *_prompts()]


def _overrides(draw: random.Random) -> list[Case]:
    keys = _settings(Recipe)
    pairs = [(key, odd) for key in keys for odd in _ODD]
    return [
        Case(
            "recipe: dry run", f"{key}={odd[:40]}", ["distill", "--dry-run", *SMALL, f"{key}={odd}"],
            names=(key.split(".")[-1], key.split(".")[0]), needs=("teacher",),
        )
        for key, odd in draw.sample(pairs, 160)
    ]  # fmt: skip


# Accepted by their type: a run must end, well or with a reason.
_EXTREME = {
    "score.learning_rate": ["1e-30", "1e3", "1e30"], "score.caption_dropout": ["1", "0.999"],
    "score.guidance_scale": ["1e30", "1e5"], "teacher.guidance_scale": ["1e38", "3"],
    "losses.final.weight": ["0", "1e20", "1e38"], "losses.step1.weight": ["0", "1e30"],
    "losses.final.distribution_matching": ["0", "1e30"], "losses.final.adversarial": ["0", "1e35"],
    "losses.final.regression": ["1e30"], "losses.consistency": ["1", "1e38"],
    "losses.tau_range": ["[0.5,0.5001]", "[0.0,1.0]", "[0.999,1]"],
    "losses.warmup_turns": ["2", "0"], "fake.learning_rate": ["1e-20", "1e6"],
    "critic.learning_rate": ["1e6"], "critic.r1": ["1e30", "1"], "critic.r1_noise": ["0", "1e30"],
    "critic.tau_range": ["[0,0.001]", "[0.999,1]"], "critic.width": ["1", "2000"],
    "critic.paired": ["false"], "critic.one_look": ["true"], "critic.network": ["score"],
    "training.learning_rate": ["1e-30", "1e6", "1e38"], "training.betas": ["[0,0]", "[1,1]", "[0.5,1]"],
    "training.weight_decay": ["1", "1e30"], "training.max_gradient_norm": ["1e-30", "1e30"],
    "training.learning_rate_decay": ["0", "1"], "training.ema_decay": ["0", "0.999999999"],
    "training.batch_size": ["1", "7", "8", "9", "1000"], "training.micro_batch": ["1", "2", "5"],
    "training.turns": ["1", "3"], "training.minutes": ["1e-9", "0.0001"],
    "training.critic_turns": ["0", "5"], "training.joint_turns": ["true"],
    "training.optimizer": ["adafactor"], "training.rate_warmup_turns": ["1", "1000000"],
    "training.checkpoint_activations": ["true"], "training.checkpoint_share": ["0", "0.3"],
    "training.seed": ["18446744073709551615", "4294967296"], "training.autocast": ["true"],
    "training.validation_samples": ["2", "3", "500"], "training.sample_prompts": ["0", "100"],
    "training.best_by": ["score"], "training.keep_checkpoints": ["1", "1000"],
    "training.validation_scores": ["[inspector]", "['x=false']", "['x=echo 1']", "['']"],
    "training.async_saves": ["true"], "training.max_non_finite": ["0", "1"],
    "data.samples_per_prompt": ["2", "50"], "data.prompt_count": ["1", "2", "9"],
    "data.other_sizes": ["[[32,64]]", "[[16,16]]", "[[32,32]]"], "data.caption_window": ["3", "1000"],
    "data.samples_per_file": ["1", "1000"], "data.seed": ["18446744073709551615"],
    "data.height": ["16", "48", "256"], "data.reals": ["teacher/vae", "files", "/dev/null"],
    "student.steps": ["shared"], "student.weights": ["lora"], "student.transition": ["renoise"],
    "student.gradient": ["cut"], "student.init": ["teacher", "pair", "run/student"],
    "distributed.sharding": ["shard"], "distributed.shard_size": ["2"], "shift": ["1e-9", "1e9", "1e38"],
    "step2_sigma": ["0.999999", "1e-9", "0.5"], "teacher.steps": ["1", "40"], "teacher.dtype": ["bfloat16"],
    "name": ["a/b", "'.'", "'..'", "'~'", "'a b'", "'-x'", "'\u00e9'", "CON"],
}  # fmt: skip


def _trained(draw: random.Random) -> list[Case]:
    pairs = [(key, value) for key, values in _EXTREME.items() for value in values]
    draw.shuffle(pairs)
    return [
        Case(
            "recipe: trained", f"{key}={value}", ["distill", *SMALL, "name=other", f"{key}={value}"],
            needs=("teacher", "cache", "pair", "files"), seconds=300,
        )
        for key, value in pairs
    ]  # fmt: skip


def _recipes() -> list[Case]:
    texts: dict[str, bytes] = {
        "empty": b"", "a list": b"- 1\n- 2\n", "a word": b"hello", "a number": b"3", "null": b"null\n",
        "utf-16": "name: x".encode("utf-16"), "nul": b"name: \0x\n", "tabs": b"name:\tx\n\tteacher: 1\n",
        "two documents": b"name: x\n---\nname: y\n", "a tag": b"!!python/name:os.system\n",
        "binary": b"name: !!binary aGVsbG8=\n", "a set": b"name: !!set {a, b}\n", "merge": b"a: &x {b: 1}\n<<: *x\n",
        "a key twice": b"name: x\nname: y\n", "a list as key": b"? [1, 2]\n: 3\n", "number keys": b"1: 2\n",
        "a timestamp": b"name: 2001-99-99\n", "deep": b"[" * 5000, "deep maps": b"{a: " * 2000,
        "long": b"name: " + b"x" * 900_000, "huge": b"name: x\n" * 400_000, "bom": codecs.BOM_UTF8 + b"name: x\n",
        "carriage returns": b"name: x\rteacher: y\r", "escape": b"name: \"\\e[31mx\"\n",
        "bidirectional": "name: \u202ex\n".encode(), "octal": b"training: {turns: 0o17}\n",
        "sexagesimal": b"training: {turns: 190:20:30}\n", "many keys": b"".join(b"k%d: 1\n" % i for i in range(5000)),
        "directive": b"%YAML 9.9\n---\nname: x\n", "unclosed": b"name: 'x\n", "gzip": gzip.compress(b"name: x"),
        "int of 5000 digits": b"training: {turns: " + b"9" * 5000 + b"}\n", "section a list": b"training: [1]\n",
        "section null": b"training: null\nname: x\nteacher: {model: zoo:emoji-teacher}\n",
    }  # fmt: skip
    found = []
    for name, text in texts.items():

        def write(here: Path, text: bytes = text) -> None:
            (here / "r.yaml").write_bytes(text)

        command = ["distill", "--dry-run", "r.yaml"]
        harmless = name in ("bom",)
        found.append(
            Case("recipe: text", name, command, write, refused=not harmless, names=("r.yaml", "recipe", "name", "training", "teacher", "key", ":"))
        )  # fmt: skip
    places = {
        "a folder": lambda h: (h / "r.yaml").mkdir(), "a pipe": lambda h: os.mkfifo(h / "r.yaml"),
        "a loop of links": lambda h: (h / "r.yaml").symlink_to("r.yaml"), "nothing": lambda h: None,
        "/dev/zero": lambda h: (h / "r.yaml").symlink_to("/dev/zero"), "/dev/stdin": lambda h: (h / "r.yaml").symlink_to("/dev/stdin"),
    }  # fmt: skip
    for name, damage in places.items():
        for command in (["distill", "--dry-run"], ["plan"], ["teach"]):
            found.append(
                Case("recipe: file", f"{command[0]} {name}", [*command, "r.yaml"], damage, refused=True, names=("r.yaml",), seconds=30)
            )  # fmt: skip
    return found


def _options() -> list[Case]:
    generate = ["generate", "--model", "run/student", "--size", "32", "--out", "new"]
    export = ["export", "--model", "run/student", "--out", "new"]
    lines = [
        [*generate, "--count", "0", "a"], [*generate, "--count", "-3", "a"], [*generate, "--seed", "-1", "a"],
        [*generate, "--seed", str(2**63 - 1), "--count", "2", "a"], [*generate, "--steps", "0", "a"], [*generate, "--steps", "3", "a"],
        [*generate, "--size", "0", "a"], [*generate, "--size", "33", "a"], [*generate, "--size", "99999x99999", "a"],
        [*generate, "--size", "32x", "a"], [*generate, "--size", "-32", "a"], [*generate, "--size", "３２", "a"],
        [*generate, "--batch-size", "0", "a"], [*generate, "--batch-size", "1000000", "a"], [*generate, "--memory", "int4", "a"],
        [*generate, "--device", "cuda:99", "a"], [*generate, "--device", "xpu", "a"], [*generate, "--device", "", "a"],
        [*generate, "--device", "meta", "a"], [*generate, "--decoder", "nowhere", "a"], [*generate, "--decoder", "teacher", "a"],
        [*generate, "--decoder", "zoo:emoji-tiny-decoder", "a"], [*generate, "--lora", "nothing", "a"], [*generate, "--lora", "pair/first.safetensors:x", "a"],
        [*generate, "--lora", "pair/first.safetensors:1e39", "a"], [*generate, "--lora", "pair/first.safetensors:nan", "a"],
        [*generate, "--lora", "teacher/vae/diffusion_pytorch_model.safetensors", "a"], [*generate, "--lora", "/dev/zero", "a"],
        [*generate, "--prompts", "nothing.txt"], [*generate], [*generate, "--prompts", "/dev/zero"], [*generate, "--prompts", "teacher"],
        [*generate, "--prompts", "a.exe"], [*generate, "--prompts", "hf:x/y/z"], [*generate, "--prompts", "hf:"],
        [*generate, "--prompt-cache", "teacher/model_index.json", "a"], [*generate, "--prompt-cache", "/proc/x", "a"],
        [*generate, "--out", "teacher/model_index.json", "a"], [*generate, "--out", "/proc/x", "a"], [*generate, "--out", "", "a"],
        [*generate, "--out", "x" * 300, "a"], [*generate, "--model", "", "a"], [*generate, "--model", "zoo:", "a"],
        [*generate, "--model", "zoo:../x", "a"], [*generate, "--model", "zoo:inspector", "a"], [*generate, "--model", "run", "a"],
        [*generate, "--model", "cache", "a"], [*generate, "--model", "teacher/model_index.json", "a"], [*generate, "--model", "/dev/null", "a"],
        [*generate, "--model", "x\0y", "a"], [*generate, "--model", "a" * 5000, "a"], [*generate, "--model", "teacher", "--preview", "a"],
        [*generate, "--model", "teacher/transformer", "a"], ["compare", "--prompt", "a"], ["compare", "run/student@3", "--prompt", "a", "--size", "32"],
        ["compare", "teacher@0", "--prompt", "a"], ["compare", "teacher@x", "--prompt", "a"], ["compare", "teacher@", "--prompt", "a"],
        ["compare", "teacher", "--prompt", "a", "--size", "32", "--out", "teacher"], ["compare", "teacher", "--prompt", "a", "--size", "32", "--out", "x.gif"],
        ["compare", "teacher", "--prompt", "a", "--size", "32", "--out", "/proc/x.png"], ["compare", "teacher@1000000000", "--prompt", "a", "--size", "32"],
        ["compare", "teacher", "--prompt", "", "--size", "32"], ["compare", "teacher", "--prompt", "a", "--count", "0"],
        [*export, "--to", "onnx"], [*export, "--to", ""], [*export, "--to", "lora"], [*export, "--to", "lora", "--teacher", "run/student"],
        [*export, "--to", "lora", "--teacher", "nowhere"], [*export, "--to", "lora", "--teacher", "teacher", "--rank", "0"],
        [*export, "--to", "lora", "--teacher", "teacher", "--rank", "65"], [*export, "--to", "lora", "--teacher", "teacher", "--energy", "nan"],
        [*export, "--to", "lora", "--teacher", "teacher", "--energy", "2"], [*export, "--to", "lora", "--teacher", "zoo:emoji-teacher"],
        [*export, "--to", "lora", "--teacher", "teacher", "--check", "nothing"], [*export, "--to", "torch", "--caption-tokens", "33", "--size", "32"],
        [*export, "--to", "torch", "--caption-tokens", "100000", "--size", "32"], [*export, "--to", "torch", "--size", "33"], [*export, "--to", "torch", "--batch-size", "0"],
        [*export, "--to", "diffusers", "--out", "teacher"], [*export, "--to", "diffusers", "--out", "run/student"], [*export, "--to", "diffusers", "--out", "/proc/x"],
        [*export, "--to", "diffusers", "--out", "teacher/model_index.json"], [*export, "--model", "teacher", "--to", "diffusers"], [*export, "--model", "pair", "--to", "lora", "--teacher", "zoo:emoji-teacher"],
        ["average", "run/student"], ["average", "run/student", "teacher", "--out", "new"], ["average", "run/student", "pair", "--out", "new"],
        ["average", "run/student", "run/student", "--out", "run/student"], ["average", "--out", "new"], ["average", "run/student", "zoo:emoji-student", "--out", "new"],
        ["assemble", "--teacher", "teacher", "--first", "nowhere", "--second", "nowhere", "--out", "new"],
        ["assemble", "--teacher", "teacher", "--first", "teacher/vae", "--second", "teacher/vae", "--out", "new"],
        ["assemble", "--teacher", "run/student", "--first", "pair/first.safetensors", "--second", "pair/second.safetensors", "--out", "new"],
        ["assemble", "--teacher", "teacher", "--first", "teacher/text_encoder/model.safetensors", "--second", "pair/second.safetensors", "--out", "new"],
        ["assemble", "--teacher", "zoo:emoji-teacher", "--first", "pair/first.safetensors", "--second", "pair/second.safetensors", "--out", "new"],
        [*EVALUATE, "--images", "3"], [*EVALUATE, "--images", "0"], [*EVALUATE, "--seeds", "0"], [*EVALUATE, "--seeds", "5"], [*EVALUATE, "--images", "5"],
        [*EVALUATE, "--size", "20"], [*EVALUATE, "--features", "nothing"], [*EVALUATE, "--features", "inspector"], [*EVALUATE, "--scores", "nothing"],
        [*EVALUATE, "--scores", "x="], [*EVALUATE, "--scores", "=x"], [*EVALUATE, "--scores", "x=cat"], [*EVALUATE, "--scores", "x='"],
        [*EVALUATE, "--scores", "x=echo nan"], [*EVALUATE, "--scores", "x=yes"], [*EVALUATE, "--scores", "x=/dev/null"], [*EVALUATE, "--scores", "x=sh -c 'exit 3'"],
        [*EVALUATE, "--scores", "x=sh -c 'kill -9 $$'"], [*EVALUATE, "--scores", "x=printf '\\033[31m'"], [*EVALUATE, "--scores", "x=echo '[1]'"],
        [*EVALUATE, "--halves", "-1"], [*EVALUATE, "--halves", "0"], [*EVALUATE, "--reference", "run/student"], [*EVALUATE, "--reference", "cache"],
        [*EVALUATE, "--reference", "zoo:emoji-teacher"], [*EVALUATE, "--model", "run/student"], [*EVALUATE, "--model", "pair"], [*EVALUATE, "--steps", "0"],
        [*EVALUATE, "--prompts", "parti", "--features", "inspector"], [*EVALUATE, "--prompts", "nothing"], [*EVALUATE, "--out", "teacher/model_index.json"],
        [*EVALUATE, "--out", "/proc/x"], ["check", "nowhere"], ["check", "teacher/model_index.json"], ["check", ""], ["check", "/dev/null"], ["check", "zoo:x"],
        ["plan", "nowhere.yaml"], ["plan", *SMALL, "--gpus", "0"], ["plan", *SMALL, "--memory", "nan"], ["plan", *SMALL, "--memory", "inf"],
        ["plan", *SMALL, "--tflops", "nan"], ["plan", *SMALL, "--tflops", "1e-300"], ["plan", *SMALL, "--prompt-tokens", "100000000"], ["plan", *SMALL, "--gpus", "3"],
        ["plan", *SMALL, "--disk-rate", "inf", "--json"], ["plan", *SMALL, "data.height=16384", "data.width=16384"], ["recipes", "--copy", "nothing"],
        ["recipes", "--copy", "emoji-demo", "--to", "teacher"], ["recipes", "--copy", "emoji-demo", "--to", "/proc/x"], ["recipes", "--to", "x"],
        ["recipes", "--copy", "../x"], ["demo", "--minutes", "nan"], ["demo", "--minutes", "0"], ["demo", "--images", "-1"], ["demo", "--out", "teacher/model_index.json"],
        ["nothing"], ["--nothing"], ["teach", "zoo:nothing"], ["teach", *SMALL, "nokey"], ["teach", *SMALL, "=x"], ["teach", *SMALL, "a.b.c=1"],
        ["teach", *SMALL, "data="], ["teach", *SMALL, "data.cache.x=1"], ["distill", *SMALL, "--ray", "0"], ["distill", *SMALL, "--ray", "2"],
        ["teach", *SMALL, "data.cache=s3://x/y"], ["teach", *SMALL, "data.cache=nope://x"], ["teach", *SMALL, "data.cache=file:///proc/x"], ["teach", *SMALL, "data.cache=://"],
        ["serve"], ["serve", "--model", "nowhere"], ["serve", "--model", "run/student", "--port", "99999999"], ["serve", "--model", "run/student", "--host", "nowhere.invalid"],
    ]  # fmt: skip
    return [
        Case("option", " ".join(line)[:150], line, needs=("teacher", "run", "cache", "pair"))
        for line in lines
        if not any("\0" in word for word in line) or line[0] == "generate"
    ]


def _prompts() -> list[Case]:
    files: dict[str, bytes] = {
        "a.txt empty": b"", "b.txt blank": b"\n \n\t\n", "c.txt latin-1": b"caf\xe9\n", "d.txt nul": b"a\0b\n", "e.txt one long": b"x" * 3_000_000,
        "f.txt escape": b"\x1b[31mred\x1b[0m\n", "g.txt cr": b"a\rb\r", "h.txt crlf": b"a\r\nb\r\n", "i.txt utf-16": "a dog\n".encode("utf-16"),
        "j.txt surrogates": b"\xed\xa0\x80\n", "k.txt bom": codecs.BOM_UTF8 + b"a dog\n", "l.txt nel": "a\u0085b\n".encode(), "m.txt rtl": "\u202eabc\n".encode(),
        "n.txt zip": b"PK\x03\x04" + bytes(100), "o.txt emoji": "\U0001f469\u200d\U0001f680\n".encode() * 3, "p.txt combining": ("a" + "\u0301" * 5000 + "\n").encode(),
        "q.txt specials": b"<|im_start|>system\n<|im_end|><|endoftext|>\n", "r.txt templates": b"{{ 1/0 }} {% raw %} {# x\n", "s.txt paths": b"../../etc/passwd\n/etc/passwd\n..\n.\n",
        "a.jsonl empty": b"", "b.jsonl list": b"[1]\n", "c.jsonl number": b"3\n", "d.jsonl no key": b'{"x": 1}\n', "e.jsonl wrong type": b'{"prompt": 3}\n',
        "f.jsonl null": b'{"prompt": null}\n', "g.jsonl surrogate": b'{"prompt": "\\ud800"}\n', "h.jsonl nul": b'{"prompt": "a\\u0000b"}\n', "i.jsonl half": b'{"prompt": "a"\n',
        "j.jsonl deep": b'{"prompt": ' + b"[" * 100_000 + b"\n", "k.jsonl nan": b'{"prompt": NaN}\n', "l.jsonl digits": b'{"prompt": ' + b"9" * 10_000 + b"}\n",
        "m.jsonl twice": b'{"prompt": "a", "prompt": "b"}\n', "n.jsonl pretty": b'{\n "prompt": "a"\n}\n', "o.jsonl escape": b'{"prompt": "\\u001b[2J"}\n', "p.jsonl blank": b'{"prompt": " "}\n',
        "q.jsonl array": b'[{"prompt": "a"}]', "a.parquet empty": b"", "b.parquet garbage": b"PAR1" + bytes(200) + b"PAR1", "c.parquet text": b"a dog\n", "d.csv": b"prompt\na dog\n",
        "e.TXT": b"a dog\n", "f.txt.gz": gzip.compress(b"a dog\n"), "g": b"a dog\n", "h.json": b'["a"]', ".txt": b"a dog\n",
    }  # fmt: skip
    fine = (
        "h.txt", "k.txt", "l.txt", "m.txt", "o.txt", "p.txt", "q.txt", "r.txt", "s.txt", "m.jsonl", "g.txt",
        "f.txt escape", "o.jsonl",
    )  # fmt: skip
    found = []
    for name, content in files.items():
        file = name.split()[0]

        def write(here: Path, file: str = file, content: bytes = content) -> None:
            (here / file).write_bytes(content)

        refused = not name.startswith(fine)
        generate = ["generate", "--model", "run/student", "--size", "32", "--out", "new", "--prompts", file]  # fmt: skip
        teach = ["teach", *SMALL, "data.cache=new", f"data.prompts={file}", "data.prompt_count=1"]
        for command, needs in ((generate, "run"), (teach, "teacher")):
            found.append(
                Case("prompt file", f"{command[0]} {name}", command, write, refused=refused, names=(file, "prompts"), needs=(needs,), finish=_inside)
            )  # fmt: skip
    texts = ["", " ", "\x1b[2J", "a\nb", "\ud800", "-", "--x", "a" * 25_000, "\u202e", "\U0010ffff", "../../x", "a/b\\c:d*e?", "CON", ".", "\u0000x"]  # fmt: skip
    for text in texts:
        command = ["generate", "--model", "run/student", "--size", "32", "--out", "new", "--", text]
        found.append(Case("prompt", repr(text)[:40], command, needs=("run",), finish=_inside))
    for content in (
        b"",
        b"\xff\xfe\n",
        b"a\0b\n",
        b"a dog",
        b"\n\n",
        b"x" * 200_000,
        "\u2028a\n".encode(),
    ):
        command = ["generate", "--model", "run/student", "--size", "32", "--out", "new", "-"]
        found.append(
            Case("prompt", f"stdin {content[:20]!r}", command, needs=("run",), stdin=content, finish=_inside)
        )  # fmt: skip
    return found


def _inside(here: Path, code: int) -> str | None:
    """Nothing is written outside the folder that was named."""
    known = {"new", "run", "teacher", ".in"}
    strange = [p.name for p in here.iterdir() if p.name not in known and not p.is_file()]
    outside = [
        p.name
        for p in here.parent.iterdir()
        if p.name not in ("world", "case") and not p.name.startswith("faults")
    ]
    return f"strange: {strange + outside}" if strange + outside else None
