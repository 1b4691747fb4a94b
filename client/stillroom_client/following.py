"""Follow files: look again every few seconds, and index what changed.

By looking, not by the kernel's notices (inotify and its like): those are silent on network mounts, containers' volumes and
after an overflow, are limited in number, and would need a second way of finding out what `Adding` finds out anyway. A look
opens no file: 100,000 unchanged ones cost a listing of their folders. At most a tenth of one core is spent on looking.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from stillroom_client.adding import Added, Adding

if TYPE_CHECKING:
    from stillroom_client.device import Device
    from stillroom_client.show_adding import AddingView

_SHARE = 9  # rests at least so many times as long as a look that found nothing took


def follow(
    adding: Adding,
    device: Device,
    view: AddingView,
    *,
    every: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Until interrupted; Ctrl-C is how it ends, and no error."""
    took = 0.0
    try:
        while True:
            sleep(max(every, _SHARE * took))
            started = time.monotonic()
            done = look(adding, device)
            if (news := adding.news(done)) or done.did_something:
                view.show(done, news, device.store.count())
            took = time.monotonic() - started if not done.did_something else 0.0
    except KeyboardInterrupt:
        view.say("stopped")


def look(adding: Adding, device: Device) -> Added:
    """One look; the index is refreshed if something changed."""
    done = adding.run()
    if done.did_something:
        device.refresh_index()
    return done
