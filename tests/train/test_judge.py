"""The judge in a run: attacks on the code verifier score zero, and what comes after is judged."""

from types import SimpleNamespace

import pytest

from train import sandbox
from train.judge import Judge
from train.rewards import RewardConfig

HONEST = "def double(x):\n    return 2 * x\n"
TESTS = "assert double(4) == 8\n"
ATTACKS = {
    "endless loop": "while True:\n    pass\n",
    "fork bomb": "import os\nwhile True:\n    os.fork()\n",
    "memory bomb": "x = bytearray(1 << 40)\n",
    "deletes files": "import shutil\nshutil.rmtree('/')\n",
    "reads outside": "print(open('/etc/shadow').read())\n",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 80))\n",
    "floods stdout": "while True:\n    print('x' * 1000)\n",
    "signals the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n",
    "ctypes": "import ctypes\nctypes.CDLL(None).setuid(0)\nctypes.CDLL(None).fork()\n",
}


class Text:
    """A tokenizer of one token a character."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.skipif(sandbox.unavailable() is not None, reason="no sandbox on this machine")
def test_attacks_are_worth_nothing_and_the_run_goes_on():
    judge = Judge(RewardConfig(), Text(), ["python"])
    prompt = SimpleNamespace(verifier="python", answer=TESTS, messages=[])
    programs = [HONEST, *ATTACKS.values(), HONEST]
    for turn in range(2):
        for number, program in enumerate(programs):
            judge.begin(number, prompt, list(map(ord, program)))
        rules, rewards = judge.finish()
        assert rules == rewards == [1.0, *[0.0] * len(ATTACKS), 1.0], turn
