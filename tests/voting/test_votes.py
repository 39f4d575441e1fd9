"""Tasks, the box, the application and what comes of the votes; no browser."""

from __future__ import annotations

import csv
import io
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from twostep.cli import app as command
from twostep.errors import InputError
from twostep.evaluation.picture_index import PictureIndex
from twostep.voting.app import AppOptions, create_app
from twostep.voting.ballot_box import BallotBox, Vote
from twostep.voting.results import summarise
from twostep.voting.server import choose, open_box
from twostep.voting.tasks import Task, Tasks
from voting_run import MODELS, PROMPTS, make_run

LABELS = {key: label for key, (_, label) in MODELS.items()}
PAIR = ("teacher_8", "student_2")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "check")


@pytest.fixture
def box(run: Path) -> Iterator[BallotBox]:
    found = open_box(run, PictureIndex.read(run))
    yield found
    found.close()


def tasks_of(box: BallotBox) -> Tasks:
    return Tasks(PAIR, 8, box.secret)


def client_of(run: Path, box: BallotBox, **options: Any) -> TestClient:
    app = create_app(PictureIndex.read(run), box, AppOptions(keys=PAIR, **options))
    return TestClient(app, base_url="http://127.0.0.1:8000")


def colours(client: TestClient, pair: dict[str, str]) -> dict[str, tuple[int, int]]:
    """(model's number, row) of both pictures: what the page cannot know, the test can see."""
    found = {}
    for side in ("left", "right"):
        with Image.open(io.BytesIO(client.get(pair[side]).content)) as image:
            assert image.size == (64, 64)
            red, green, _ = image.getpixel((3, 3))  # type: ignore[misc]
            found[side] = red // 40, green // 10
    return found


def test_everyone_sees_every_pair_once_in_an_order_and_on_sides_of_their_own() -> None:
    tasks = Tasks(["a", "b", "c"], 20, b"secret")
    assert len(tasks) == 60

    def walk(voter: str, counts: Counter[Task]) -> list[Task]:
        own: list[Task] = []
        while found := tasks.next(voter, own=own, counts=counts, number=1):
            own.append(found[0])
        return own

    first = walk("ann", Counter())
    assert len(set(first)) == 60
    assert walk("ann", Counter()) == first
    assert walk("bob", Counter()) != first
    # What nobody judged comes first, but every eighth task is one that somebody did.
    seen = Counter(first[:30])
    second = walk("bob", seen)
    judged = [task in seen for task in second[:30]]
    assert judged == [(n + 1) % 8 == 0 for n in range(30)]
    # Sides: the same each time, by chance over voters.
    shown = [tasks.show(f"voter {n}", first[0]) for n in range(400)]
    assert shown[:9] == [tasks.show(f"voter {n}", first[0]) for n in range(9)]
    assert 150 < sum(each.left == first[0].first for each in shown) < 250
    assert all({each.left, each.right} == {first[0].first, first[0].second} for each in shown)
    assert len({each.name for each in shown}) == 400


def test_a_voter_votes_skips_and_takes_back(run: Path, box: BallotBox) -> None:
    client = client_of(run, box, goal=5)
    page = client.post("/api/next", json={"voter": " ann "}).json()
    assert (page["done"], page["goal"], page["total"], page["undo"]) == (0, 5, 8, False)
    pair = page["pairs"][0]
    sides = colours(client, pair)
    assert {model for model, _ in sides.values()} == {0, 2}
    row = sides["left"][1]
    assert pair["prompt"] == PROMPTS[row % 4]
    # Nothing that the page is sent says which is which.
    assert not any(key.split("_")[0] in json.dumps(page) for key in MODELS)
    body = {"voter": "ann", "task": pair["task"], "answer": "left", "seconds": 1.5}
    after = client.post("/api/vote", json=body).json()
    assert after["done"] == 1
    assert after["pairs"][0] == page["pairs"][1]  # what was fetched ahead is what comes
    again = client.post("/api/vote", json=body | {"answer": "right"}).json()
    assert again["done"] == 1  # a double click is one vote
    vote = box.votes()[0]
    left = {0: "teacher_8", 2: "student_2"}[sides["left"][0]]
    assert (vote.voter, vote.task.row, vote.left, vote.answer, vote.seconds) == (
        "ann", row, left, "left", 1.5,
    )  # fmt: skip
    # Undo shows the same pictures on the same sides; what was taken back stays in the file.
    back = client.post("/api/undo", json={"voter": "ann"}).json()
    assert back["done"] == 0
    assert back["pairs"][0] == pair
    assert box.votes() == []
    client.post("/api/vote", json=body | {"answer": "skip"})
    assert [v.answer for v in box.votes()] == ["skip"]
    assert sum(box.counts().values()) == 0
    # Another voter's task is not hers; a server that began anew knows whose it is.
    fresh = client_of(run, box)
    for server in (client, fresh):
        assert server.post("/api/vote", json=body | {"voter": "bob"}).status_code == 409
    body["task"] = after["pairs"][0]["task"]
    assert fresh.post("/api/vote", json=body).json()["done"] == 2
    assert box.votes()[1].task == tasks_of(box).find("ann", body["task"]).task  # type: ignore[union-attr]
    assert client.get("/picture/0-left.png").status_code == 404
    for wrong in (
        {"voter": " "},
        {"voter": "x" * 41},
        {"voter": "ann", "task": "x", "answer": "a"},
    ):
        path = "/api/vote" if "task" in wrong else "/api/next"
        assert client.post(path, json=wrong).status_code == 422
    assert client.post("/api/undo", json={"voter": "nobody"}).json()["done"] == 0


def test_other_sites_and_uninvited_visitors_stay_out(run: Path, box: BallotBox) -> None:
    client = client_of(run, box, hosts={"127.0.0.1"})
    body = {"voter": "ann"}
    assert client.post("/api/next", json=body).status_code == 200
    assert client.post("/api/next", json=body, headers={"host": "evil.example"}).status_code == 403
    origin = {"origin": "http://evil.example"}
    assert client.post("/api/next", json=body, headers=origin).status_code == 403
    assert client.get("/page/..%2fapp.py").status_code == 404
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]
    asked = client_of(run, box, invitation=box.invitation)
    assert asked.get("/").status_code == 200
    assert asked.post("/api/next", json=body).status_code == 403
    invited = {"x-invitation": box.invitation}
    assert asked.post("/api/next", json=body, headers=invited).status_code == 200


def test_several_voters_at_once_lose_no_vote(run: Path, box: BallotBox) -> None:
    client = client_of(run, box)

    def work(voter: str) -> None:
        chance = random.Random(voter)
        page = client.post("/api/next", json={"voter": voter}).json()
        while page["pairs"]:
            answer = chance.choice(["left", "right", "same"])
            body = {"voter": voter, "task": page["pairs"][0]["task"], "answer": answer}
            page = client.post("/api/vote", json=body).json()

    voters = [f"voter {n}" for n in range(4)]
    threads = [threading.Thread(target=work, args=(voter,)) for voter in voters]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(vote.voter for vote in box.votes()) == dict.fromkeys(voters, 8)
    again = open_box(run, PictureIndex.read(run))
    assert again.votes() == box.votes()
    again.close()


def test_votes_on_other_pictures_do_not_count(run: Path, box: BallotBox) -> None:
    index = PictureIndex.read(run)
    task = Task(0, *PAIR)
    box.add("ann", tasks_of(box).show("ann", task), "left", seconds=None)
    box.close()
    make_run(run, student="another")
    later = open_box(run, PictureIndex.read(run))
    assert (later.votes(), later.earlier()) == ([], 1)
    later.close()
    with pytest.raises(InputError, match="of another evaluation than its index"):
        index.picture("student_2", 0)
    with pytest.raises(InputError, match="no pictures of 'x'"):
        choose(index, ["x"])
    with pytest.raises(InputError, match="two models or more, got teacher_8"):
        choose(index, ["teacher_8"])
    assert choose(index) == PAIR
    assert choose(index, ["student_2/preview", "reference", "teacher_8"]) == (
        "teacher_8", "student_2/preview", "reference",
    )  # fmt: skip
    (run / "votes.sqlite").write_bytes(b"no votes at all" * 99)
    for name in ("votes.sqlite-wal", "votes.sqlite-shm"):
        (run / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="holds no votes"):
        open_box(run, index)


def test_pictures_of_an_index(run: Path) -> None:
    index = PictureIndex.read(run)
    assert len(index) == 8
    assert index.picture("student_2", 7)[:, 0, 0].tolist() == [80, 70, 100]
    assert index.picture("student_2/preview", 7)[:, 0, 0].tolist() == [175, 185, 155]
    assert index.prompt(6) == PROMPTS[2]
    with pytest.raises(InputError, match="expected the --out of `twostep evaluate`"):
        PictureIndex.read(run / "images")


def vote(voter: str, row: int, answer: str, *, swapped: bool = False) -> Vote:
    left, right = PAIR[::-1] if swapped else PAIR
    return Vote(voter, Task(row, *PAIR), left, right, answer, "2026", 2.0)  # type: ignore[arg-type]


def test_what_the_votes_come_to() -> None:
    votes = [
        vote("ann", 0, "right"),  # the student
        vote("ann", 1, "left", swapped=True),  # the student
        vote("ann", 2, "left"),  # the teacher
        vote("ann", 3, "same"),
        vote("ann", 4, "skip"),
        vote("bob", 0, "right"),  # agrees with ann: one pair of pictures, still
        vote("bob", 1, "left"),  # does not
    ]
    found = summarise(votes, LABELS, earlier=3)
    assert (found["votes"], found["skipped"], found["pictures"], found["earlier"]) == (6, 1, 4, 3)
    (pair,) = found["pairs"]
    assert (pair["model"], pair["against"]) == ("student_2", "teacher_8")
    assert (pair["better"], pair["same"], pair["worse"]) == (3, 1, 2)
    # Rows 0 to 3 are 1, the mean of 1 and 0, 0 and 1/2: 2 of 4.
    assert (pair["share"], pair["count"]) == (0.5, 4)
    assert found["left"]["share"] == 3 / 5
    assert (found["agreement"]["share"], found["agreement"]["count"]) == (0.5, 2)
    assert [(v["voter"], v["votes"], v["skipped"]) for v in found["voters"]] == [
        ("ann", 4, 1), ("bob", 2, 0),
    ]  # fmt: skip
    assert found["strengths"] == {}
    third = Task(0, "student_2", "reference")
    more = [*votes, Vote("ann", third, "student_2", "reference", "left", "2026", None)]
    strengths = summarise(more, LABELS)["strengths"]
    assert strengths["student_2"]["strength"] > strengths["reference"]["strength"]


def test_results_by_the_command(run: Path, box: BallotBox) -> None:
    tasks = tasks_of(box)
    for row in range(3):
        shown = tasks.show("=ann", Task(row, *PAIR))
        answer = "left" if shown.left == "student_2" else "right"
        box.add("=ann", shown, answer, seconds=1.0)  # type: ignore[arg-type]
    done = CliRunner().invoke(command, ["vote", str(run), "--results"])
    assert done.exit_code == 0, done.output
    line = "student, 2 steps against teacher, 8 steps: 100% (44% to 100%, n = 3); 3 better, 0 same"
    assert line in " ".join(done.output.split())
    report = (run / "report.html").read_text()
    assert report.startswith("<p>before</p>")
    assert report.endswith("<p>after</p>")
    assert "44% to 100%" in report
    rows = list(csv.DictReader(io.StringIO((run / "votes.csv").read_text())))
    assert [row["better"] for row in rows] == ["student_2"] * 3
    assert rows[2]["voter"] == "'=ann"  # no spreadsheet runs it
    assert (rows[2]["prompt"], rows[2]["seed"]) == (PROMPTS[2], "1002")
    # Once more: the section is replaced, not repeated.
    CliRunner().invoke(command, ["vote", str(run), "--results"])
    assert (run / "report.html").read_text() == report
