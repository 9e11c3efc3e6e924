"""The program of a grading child: pairs of answers in, whether they are equal out, a line of JSON each.

`grading.py` runs this file by its path in a Python of its own. It imports nothing of this package, holds no device,
no socket and no secret, and may be killed at any moment.

    {"ready": true}                    out, once mathruler is loaded; or {"error": "..."}, and the program ends
    ["x+1", "1+x"]                     in: the answer given and the right one
    {"equal": true}                    out; or {"error": "..."} if mathruler raised

mathruler hands text to sympy's `parse_expr`, which is Python's `eval`. Therefore: memory is limited, nothing can be
written to a file, an audit hook refuses to start programs, to open sockets and to change the file system, and a pair
that takes longer than its share of CPU time ends the process, whatever code it is in.
"""

import json
import os
import resource
import signal
import sys

REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "webbrowser.", "urllib.")
HARMLESS = ("os.listdir", "os.scandir")  # the import system's
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main(cpu_seconds: float, memory: int) -> None:
    """Answers until standard input ends.

    Args:
      cpu_seconds: of CPU time a pair may take.
      memory: bytes of address space.
    """
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no reply

    def reply(**fields: object) -> None:
        print(json.dumps(fields), file=replies, flush=True)

    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit, limit) if hard == resource.RLIM_INFINITY else (min(limit, hard),) * 2)
    try:
        from mathruler.grader import grade_answer
    except ImportError as error:
        reply(error=str(error))
        return
    grade_answer("x+1", "1+x")  # sympy loads much of itself when first used
    sys.addaudithook(_refuse)
    reply(ready=True)
    for line in sys.stdin:
        given, gold = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # SIGPROF ends the process, without Python's help
        try:
            answer = {"equal": bool(grade_answer(given, gold))}
        except Exception as error:  # whatever a library may raise on whatever a model may write
            answer = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        reply(**answer)


def _refuse(event: str, arguments: tuple) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
    if writes or (event.startswith(REFUSED) and event not in HARMLESS):
        raise PermissionError(f"{event} is not for answers to do")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
