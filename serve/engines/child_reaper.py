"""The end of processes that would outlive ours."""

from __future__ import annotations

import contextlib
import subprocess


class ChildProcessReaper:
    """Kills an engine's processes when this one is killed: they would stay, with the model in memory, for good.

    A shell that reads process ids until our end of its pipe closes, which the kernel does for us.
    """

    SCRIPT = 'ids=; while read -r id; do [ "$id" = done ] && exit; ids="$ids $id"; done; [ -z "$ids" ] || kill -9 $ids'

    def __init__(self):
        self._shell, self._watched = None, set()

    def watch(self, processes: list) -> None:
        """Add processes, those that are not known yet."""
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
        """End the watch: the processes have ended in order."""
        if self._shell is not None:
            with contextlib.suppress(OSError):
                self._shell.stdin.write("done\n")
                self._shell.stdin.close()
            self._shell.wait()
            self._shell = None
