"""A service under load: no answer is wrong or lost, whatever happens meanwhile."""

import http.client
import random
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np
import pytest

from helpers.service import BAD, Client, expected, picture, running, until, write_state

pytestmark = pytest.mark.slow

PICTURES = [picture(seed) for seed in range(12)]
TASKS = ("birds", "cars", "dogs", "swap")
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Asked:
    """A request and its answer."""

    task: str
    image: int | None  # its place in PICTURES; None for a bad image
    began: float
    ended: float
    status: int
    answer: dict


@pytest.fixture
def states(tmp_path):
    folder = tmp_path / "states"
    folder.mkdir()
    for number, task in enumerate(TASKS):
        write_state(folder / f"{task}.safetensors", number, 3 + 2 * number)
    # other prompts, other classes, and fewer of them
    write_state(tmp_path / "swap.safetensors", 99, 4, prefix="new")
    return folder


def load(service, clients, requests, begun):
    """Sends requests from some clients at once, 5 % of them bad, and returns all answers."""
    answers, failures, deal = [], [], iter(range(requests))
    lock = threading.Lock()

    def work(number):
        client, draw = Client(service), random.Random(number)
        try:
            while True:
                with lock:
                    if next(deal, None) is None:
                        return
                task = draw.choice(TASKS)
                image = None if draw.random() < 0.05 else draw.randrange(len(PICTURES))
                start = time.monotonic()
                status, answer, _ = client.predict(task, BAD if image is None else PICTURES[image])
                answers.append(Asked(task, image, start, time.monotonic(), status, answer))
                if len(answers) >= requests // 2:
                    begun.set()
        except Exception as error:
            failures.append(error)
            begun.set()
        finally:
            client.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    return threads, answers, failures


def is_of(answer, truth, image):
    """Whether an answer has the best class of a state, with its probability."""
    names, shares = truth
    (prediction,) = answer["predictions"]
    best = prediction["classes"][0]
    place = int(shares[image].argmax())
    return best["name"] == names[place] and abs(best["probability"] - shares[image][place]) < TOLERANCE


@pytest.mark.parametrize("requests", [400, pytest.param(2000, marks=pytest.mark.endurance)])
def test_no_label_is_wrong_and_none_is_lost_while_a_state_is_replaced(states, tmp_path, capsys, requests):
    truth = {task: expected(states / f"{task}.safetensors", PICTURES) for task in TASKS}
    new = expected(tmp_path / "swap.safetensors", PICTURES)
    for task in TASKS:  # the test could not tell answers apart otherwise
        assert np.sort(truth[task][1], axis=1)[:, -1].max() <= 1
    with running(tmp_path, states) as service:
        half = threading.Event()
        started = time.monotonic()
        threads, answers, failures = load(service, 16, requests, half)
        half.wait(120)
        (tmp_path / "swap.safetensors").replace(states / "swap.safetensors")
        replaced = time.monotonic()
        until(lambda: "new_0" in service.get("/v1/tasks/swap").json()["classes"])
        certain = time.monotonic()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - started
        metrics = service.get("/metrics").text
        assert service.stop() == 0
    assert failures == []
    assert len(answers) == requests, "none is lost"
    counts = Counter()
    for asked in answers:
        if asked.image is None:
            assert (asked.status, asked.answer) == (
                400,
                {"error": "image 1 cannot be decoded (not an image of a known format)"},
            )
            counts["bad"] += 1
            continue
        assert asked.status == 200, asked
        is_old = is_of(asked.answer, truth[asked.task], asked.image)
        is_new = asked.task == "swap" and is_of(asked.answer, new, asked.image)
        assert is_old or is_new, f"wrong: {asked}"
        assert is_old or asked.ended > replaced, "no answer is from the future"
        assert is_new or asked.task != "swap" or asked.began < certain, "no answer is from the past"
        counts["new" if is_new else "old"] += 1
    assert counts["bad"] > 0.02 * requests
    assert counts["new"] > 0
    (batches,) = re.findall(r"^visprompt_batch_images_count ([\d.]+)", metrics, re.M)
    times = sorted(asked.ended - asked.began for asked in answers)
    with capsys.disabled():
        print(
            f"\n{requests} requests from 16 clients: {requests / seconds:.0f} a second, "
            f"p50 {1000 * times[requests // 2]:.0f} ms, p99 {1000 * times[requests * 99 // 100]:.0f} ms; "
            f"{(requests - counts['bad']) / float(batches):.1f} images in a batch; {dict(counts)}"
        )
    assert float(batches) < requests - counts["bad"], "batches hold images of several requests"


def test_sigterm_under_load_loses_no_accepted_request(states, tmp_path):
    with running(tmp_path, states) as service:
        answered, ended, open_requests = Counter(), [], set()
        signalled = threading.Event()

        def work(number):
            client = Client(service, keep=number % 2 == 0)
            for turn in range(100_000):
                open_requests.add(number)
                try:
                    status, _, _ = client.predict(TASKS[turn % len(TASKS)], PICTURES[turn % len(PICTURES)])
                except (OSError, http.client.HTTPException) as error:
                    ended.append(error)
                    client.close()
                    return
                finally:
                    open_requests.discard(number)
                answered[status, signalled.is_set()] += 1

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        until(lambda: answered[200, False] > 100)
        until(lambda: len(open_requests) > 8)
        signalled.set()
        assert service.stop() == 0
        for thread in threads:
            thread.join()
        log = service.log.read_text()
        (stopped,) = re.findall(r"stopped: (\d+) requests accepted, (\d+) answered", log)
        assert stopped[0] == stopped[1], log
        assert sum(answered.values()) + service.asked == int(stopped[1]), (answered, ended)
        assert {status for status, _ in answered} == {200}
        assert answered[200, True] > 0, "requests were open when the signal came"
        assert len(ended) == 16, "each client ended because the service had gone"
        assert "Traceback" not in log


class Upload:
    """A request whose body comes in two parts."""

    def __init__(self, service, content=PICTURES[0]):
        head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        self.body = head + content + b"\r\n--b--\r\n"
        host, port = urlsplit(service.url).netloc.split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=60)
        lines = (
            "POST /v1/tasks/birds/predict HTTP/1.1",
            "Host: a",
            "Content-Type: multipart/form-data; boundary=b",
            f"Content-Length: {len(self.body)}",
        )
        self.socket.sendall("\r\n".join((*lines, "", "")).encode() + self.body[:100])

    def finish(self):
        self.socket.sendall(self.body[100:])
        return self.answer()

    def answer(self):
        with self.socket, http.client.HTTPResponse(self.socket) as answer:
            answer.begin()
            answer.read()
            return answer.status


def admitted(service):
    (count,) = re.findall(r"^visprompt_admitted_images ([\d.]+)", service.get("/metrics").text, re.M)
    return int(float(count))


def test_a_full_service_answers_429_and_late_requests_free_their_room(states, tmp_path):
    given = ("limits.queue=3", "limits.images=3", "limits.seconds=4")
    with running(tmp_path, states, *given) as service:
        service.predict("birds", *PICTURES[:3])  # the first batch is slow
        uploads = [Upload(service) for _ in range(2)]
        until(lambda: admitted(service) == 2)
        refused = service.predict("birds", *PICTURES[:2])
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"] == "the service is full: try again in 1 seconds"
        assert service.predict("birds", PICTURES[0]).status_code == 200, "one fits"
        assert [upload.finish() for upload in uploads] == [200] * 2
        started = time.monotonic()
        late = [Upload(service) for _ in range(3)]
        until(lambda: admitted(service) == 3)
        assert service.predict("birds", PICTURES[0]).status_code == 429
        assert service.get("/health/ready").status_code == 200, "health is asked beside the queue"
        assert [upload.answer() for upload in late] == [504] * 3
        assert 3.9 < time.monotonic() - started < 20
        until(lambda: admitted(service) == 0)
        left = Upload(service)
        until(lambda: admitted(service) == 1)
        left.socket.close()
        until(lambda: admitted(service) == 0)
        assert service.predict("birds", *PICTURES[:3]).status_code == 200
        assert "Traceback" not in service.log.read_text()


def test_after_sigterm_an_upload_that_had_begun_is_answered_and_one_that_never_ends_is_given_up(
    states, tmp_path
):
    with running(tmp_path, states, "limits.drain_seconds=4") as service:
        upload, endless = Upload(service), Upload(service)
        until(lambda: admitted(service) == 2)
        service.process.terminate()
        until(lambda: "SIGTERM: answering the open requests" in service.log.read_text())
        time.sleep(0.5)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", urlsplit(service.url).port), timeout=5)
        assert upload.finish() == 200
        assert service.process.wait(30) == 0
        endless.socket.close()
        assert "a request was cut off" in service.log.read_text()
        assert "Traceback" not in service.log.read_text()
