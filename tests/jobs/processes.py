"""A job whose handler uses threads and processes as each record says.

Names come from the environment: FCLUSTER_TEST_JOB, FCLUSTER_TEST_SOURCE, FCLUSTER_TEST_OUTPUT.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from fcluster import Job

job = Job(os.environ["FCLUSTER_TEST_JOB"])
source = job.topic(os.environ["FCLUSTER_TEST_SOURCE"], value="json")
output = job.topic(os.environ["FCLUSTER_TEST_OUTPUT"], value="json")
STAYING = []
"""Processes that are started and never ended. Kept here, so that they aren't garbage-collected."""


def square(number):
    return number * number


def look_around(_number=0):
    """What a child sees of itself."""
    targets = []
    for name in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            pass
    inodes = {target[8:-1] for target in targets if target.startswith("socket:")}
    tables = [Path(f"/proc/self/net/{table}") for table in ("tcp", "tcp6")]
    rows = [row.split() for table in tables if table.exists() for row in table.read_text().splitlines()[1:]]
    return {
        "tcp": [f"{row[1]}-{row[2]}" for row in rows if row[9] in inodes],
        "stores": [target for target in targets if "/state/" in target or ".sst" in target],
        "handlers": [
            repr(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        ],
    }


def pool(method, function, numbers):
    with multiprocessing.get_context(method).Pool(2) as workers:
        return workers.map(function, numbers)


def executor(method, function, numbers):
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)) as workers:
        return list(workers.map(function, numbers))


def in_thread(function, *arguments):
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*arguments)))
    thread.start()
    thread.join()
    return found[0]


def sleep_on():
    time.sleep(1000)


def stay(how):
    """Start something that doesn't end by itself."""
    if how == "subprocess":
        STAYING.append(subprocess.Popen(["sleep", "1000"]))
    elif how == "daemon":  # in its own session, orphaned at once, and without our environment
        subprocess.run(["setsid", "--fork", "sleep", "1000"], check=True)
    elif how == "grandchild":
        subprocess.run(["sh", "-c", "sleep 1000 & exec true"], env={"PATH": os.environ["PATH"]}, check=True)
    elif how == "fork-in-fork":
        process = multiprocessing.get_context("fork").Process(target=stay, args=("os.fork",))
        process.start()
        STAYING.append(process)
    elif how == "os.fork":
        if os.fork() == 0:
            time.sleep(1000)
            os._exit(0)
        time.sleep(1000 if multiprocessing.parent_process() else 0)
    elif how == "executor":
        for method in ("fork", "spawn", "forkserver"):
            staying = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method))
            staying.submit(sleep_on)
            STAYING.append(staying)
    elif how == "thread":
        STAYING.append(threading.Thread(target=sleep_on))
        STAYING[-1].start()
    else:
        process = multiprocessing.get_context(how).Process(target=sleep_on)
        process.start()
        STAYING.append(process)
    return how


def do(how, ctx):
    kind, _, method = how.partition(" ")
    match kind:
        case "subprocess":
            text = "import os, json; print(json.dumps(sorted(os.listdir('/proc/self/fd'))))"
            return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout.strip()
        case "threads":
            with ThreadPoolExecutor(4) as workers:
                return sum(workers.map(square, range(5)))
        case "state":
            in_thread(lambda: ctx.state.update(n=1))
            return dict(ctx.state)
        case "pool":
            return sum(pool(method, square, range(5)))
        case "executor":
            return sum(executor(method, square, range(5)))
        case "threaded-pool":
            return sum(in_thread(pool, method, square, range(5)))
        case "look":
            return pool(method, look_around, [0])[0]
        case "stay":
            return stay(method)
        case "comes-back":
            return "worker" if os.fork() else "child"


@job.process(source, to=output)
def work(ctx, record):
    return {"how": record["how"], "got": do(record["how"], ctx), "pid": os.getpid()}
