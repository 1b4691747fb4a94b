"""Search on a device: the public face of the client room.

Importing it loads neither torch nor transformers nor flwr, and takes under a second.
"""

from __future__ import annotations

from stillroom_client.cache import CacheCounts as CacheCounts
from stillroom_client.cache import CacheLimits as CacheLimits
from stillroom_client.device import Device as Device
from stillroom_client.device import Status as Status
from stillroom_client.documents import Located as Located
from stillroom_client.documents import Position as Position
from stillroom_client.encoder import Encoder as Encoder
from stillroom_client.filters import FilterError as FilterError
from stillroom_client.ranking import Hit as Hit
from stillroom_client.ranking import Mode as Mode
from stillroom_client.store import Change as Change
from stillroom_client.store import Feedback as Feedback
