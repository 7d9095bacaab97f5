"""Tasks of an event loop that belong together."""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any


async def together(parts: Iterable[Coroutine[Any, Any, None]]) -> None:
    """As asyncio.gather; when one raises, or this is cancelled, the others do not go on."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancelled(tasks)


async def cancelled(tasks: Iterable["asyncio.Task[None]"]) -> None:
    """Cancels tasks, and waits for their ends. What they raise then is not told: one error is enough."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def landed(tasks: "set[asyncio.Future[None]]", **how: Any) -> "set[asyncio.Future[None]]":
    """As asyncio.wait, those that have ended; raises what one of them raised."""
    ended, _ = await asyncio.wait(tasks, **how)
    for task in ended:
        task.result()
    return ended
