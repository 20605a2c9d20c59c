"""`llamax data show` of conversations: every token, which of them are learnt, what is cut or left out, and why."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from llamax import cli
from llamax.data.show import show
from tests.runs import FIXTURES, tiny_run

RUN = tiny_run()
SHOWN = dict(tokenizer=RUN.data.tokenizer, vision=RUN.model.vision)


def printed(path: Path, n: int, colours: bool = False, **how) -> str:
    file = io.StringIO()
    system = "truecolor" if colours else None
    show(path, n, console=Console(file=file, width=1000, force_terminal=colours, color_system=system), **(SHOWN | how))
    return file.getvalue()


def test_what_is_learnt_stands_in_marks_or_is_green(tmp_path):
    said = printed(FIXTURES / "chat.toml", 25, out_dir=tmp_path)
    learnt = re.findall(r"«(.*?)»", said, re.DOTALL)
    wanted = []
    for line in (FIXTURES / "chat.jsonl").read_text().splitlines():
        for message in json.loads(line)["messages"]:
            if message["role"] == "assistant" and message.get("train", True):
                wanted.append(message["content"])
    assert len(learnt) == len(wanted)
    assert all(text.endswith("<|eot|>") for text in learnt)
    assert {text for text in wanted if text} <= {text.removesuffix("<|eot|>") for text in learnt}
    assert "<|python_start|><|python_end|>{" in said and "<|begin_of_text|><|header_start|>" in said
    assert "«RIVER" not in said and "RIVER" in said
    coloured = printed(FIXTURES / "chat.toml", 25, colours=True, out_dir=tmp_path)
    green = re.findall(r"\x1b\[[0-9;]*32m(.*?)\x1b", coloured, re.DOTALL)
    assert "«" not in coloured and "This is a red circle." in green and "RIVER" not in "".join(green)
    n = sum(int(n) for n in re.findall(r"(\d+) tokens learnt, \d+ only", said))
    assert f"{n} tokens learnt (" in said and "all 25 documents" in said


def test_answers_have_headings_and_their_pictures_a_sheet(tmp_path):
    said = printed(FIXTURES / "pairs_pictures.jsonl", 4, out_dir=tmp_path)
    assert said.count("-- chosen") == said.count("-- rejected") == 4 and said.count("better by 1)") == 2
    assert said.index("«This is a red circle") < said.index("-- rejected") < said.index("«This is a blue star")
    sheet = Image.open(tmp_path / "pairs_pictures.png")
    assert sheet.height > 4 * 112 and len(sheet.getcolors(10**6)) > 3
    said = printed(FIXTURES / "labelled.toml", 24)
    assert said.count("-- good") == said.count("-- bad") == 12


def test_rows_of_a_recipe_say_what_is_cut_or_left_out(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        "\n".join(
            [
                json.dumps(
                    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a " * 99}]}
                ),
                json.dumps({"messages": [{"role": "robot", "content": "Hi"}]}),
                json.dumps({"prompt": "Hi", "chosen": "a", "rejected": "a"}),
                json.dumps({"prompt": "Hi", "chosen": "a", "rejected": "b"}),
                "{",
            ]
        )
    )
    data = dataclasses.replace(RUN.data, seq_len=64, comparisons_per_row=4)
    said = printed(tmp_path / "x.jsonl", 5, data=data)
    assert re.search(r"longer than a row.*\(it takes \d+ tokens, and a row has 64", said)
    assert "message 0 (role robot): a role is one of" in said and "are the same" in said and "cannot be decoded" in said
    assert "1 skipped: the conversation is longer" in said and "2 skipped: the record is damaged" in said
    said = printed(tmp_path / "x.jsonl", 5, data=dataclasses.replace(data, too_long="cut_end", comparisons_per_row=0))
    assert "lost its end, to fit into a row" in said and "1 lost their ends" in said
    assert "comparisons_per_row = 0" in said and "2 skipped: answers are compared" in said


def test_the_command_shows_a_file(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "show", str(FIXTURES / "pairs.jsonl"), "-n", "1"]) in (0, None)
    assert "-- chosen" in capsys.readouterr().out


@pytest.mark.parametrize("odd", ["[red]x[/red]", "\x1b[31m", "‮", "a\0b"])
def test_no_text_speaks_to_the_terminal(tmp_path, odd):
    messages = [{"role": "user", "content": odd}, {"role": "assistant", "content": odd}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages, "id": odd, "meta": {odd: odd}}))
    said = printed(tmp_path / "x.jsonl", 1)
    assert "\x1b" not in said and "‮" not in said and "\0" not in said
    if "red" in odd:
        assert said.count(odd) == 5
