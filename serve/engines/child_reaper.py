"""Kill the engine's child processes if this process is killed."""

from __future__ import annotations

import contextlib
import subprocess


class ChildProcessReaper:
    """Kill an engine's processes when this process is killed; otherwise they would stay, with the model in memory.

    A shell reads process ids until the pipe closes, which the kernel does when this process ends.
    """

    SCRIPT = 'ids=; while read -r id; do [ "$id" = done ] && exit; ids="$ids $id"; done; [ -z "$ids" ] || kill -9 $ids'

    def __init__(self):
        self._shell, self._watched = None, set()

    def watch(self, processes: list) -> None:
        """Add the processes that are not watched yet."""
        for process in processes:
            if process.pid not in self._watched:
                if self._shell is None:
                    # in a session of its own, so that what ends our process group does not end it
                    self._shell = subprocess.Popen(
                        ["sh", "-c", self.SCRIPT], stdin=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
                    )
                self._watched.add(process.pid)
                self._shell.stdin.write(f"{process.pid}\n")

    def dismiss(self) -> None:
        """Stop watching: the processes have ended regularly."""
        if self._shell is not None:
            with contextlib.suppress(OSError):
                self._shell.stdin.write("done\n")
                self._shell.stdin.close()
            self._shell.wait()
            self._shell = None
