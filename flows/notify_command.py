"""``mlorq notify``: automations of Prefect that send a message when a run has finished, missed its goal or failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from flows.goal import GOAL_MISSED, RUN_FINISHED
from flows.options import Arguments, Finish, command
from flows.verbosity import say
from mlorq.errors import ConfigError

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.automations import AutomationCore

FLOWS = ("compress", "rebudget", "sweep", "compare")
ON = ("finished", "missed", "failed")
NAME = "mlorq: {what} runs to {block}"


@command
@click.argument("block", metavar="TYPE/NAME")
@click.option(
    "--on",
    "events",
    metavar="EVENTS",
    default=",".join(ON),
    help=f"comma-separated list of {', '.join(ON)}; default: all",
)
@click.option("--remove", is_flag=True, help="remove the automations")
def notify(arguments: Arguments) -> Finish:
    """Send messages about runs to a notification block of Prefect."""
    wanted = [part.strip() for part in arguments.events.split(",") if part.strip()]
    wrong = [what for what in wanted if what not in ON]
    if wrong or not wanted:
        raise ConfigError(f"--on: expected some of {', '.join(ON)} (given: {arguments.events!r:.60})")
    kind, separator, name = arguments.block.partition("/")
    if not (kind and separator and name):
        raise ConfigError(
            f"expected TYPE/NAME of a notification block, such as slack-webhook/team, not {arguments.block!r:.60}"
        )
    for line in set_up(kind, name, wanted, remove=arguments.remove):
        say(line)
    return lambda: 0


def set_up(kind: str, name: str, wanted: list[str], *, remove: bool = False) -> list[str]:
    """Create, change or remove automations on the configured server.

    Args:
        kind: type of the notification block.
        name: of the block.
        wanted: of ``ON``; automations of the others are removed.
        remove: remove all.

    Returns:
        What was done, one line each.

    Raises:
        ConfigError: no server is configured or it does not answer, or there is no such block.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value() is None:
        raise ConfigError("notify needs a running Prefect server (PREFECT_API_URL), which sends the messages")
    done = []
    try:
        with get_client(sync_client=True) as client:
            block = client.read_block_document_by_name(name, kind)
            for what in ON:
                title = NAME.format(what=what, block=f"{kind}/{name}")
                known = client.read_automations_by_name(title)
                if what in wanted and not remove:
                    automation = automation_of(what, title, block.id)
                    if known:
                        client.update_automation(known[0].id, automation)
                    else:
                        client.create_automation(automation)
                    done.append(f"{title}: {'changed' if known else 'created'}")
                else:
                    for one in known:
                        client.delete_automation(one.id)
                        done.append(f"{title}: removed")
    except ObjectNotFound:
        raise ConfigError(f"there is no block {kind}/{name}: `prefect block ls` lists them") from None
    except httpx.HTTPError as error:
        raise ConfigError(f"the Prefect server at {PREFECT_API_URL.value()} does not answer: {error}") from None
    return done or ["there was nothing to remove"]


def automation_of(what: str, title: str, block: UUID) -> AutomationCore:
    """The automation for one kind of message.

    Args:
        what: one of ``ON``.
        title: its name.
        block: id of the notification block.
    """
    from prefect.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.actions import SendNotification

    match: dict[str, Any] = {}
    if what == "failed":
        states = ("Failed", "Crashed", "TimedOut")
        match["expect"] = {f"prefect.flow-run.{state}" for state in states}
        match["match_related"] = {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}
        subject = "mlorq: {{ flow_run.name }}"
        body = "{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}"
    else:
        match["expect"] = {RUN_FINISHED if what == "finished" else GOAL_MISSED}
        subject = f"mlorq: {{{{ event.payload.model }}}} {'finished' if what == 'finished' else 'missed its goal'}"
        body = "{{ event.payload.text }}"
    trigger = EventTrigger(posture=Posture.Reactive, threshold=1, **match)
    action = SendNotification(block_document_id=block, subject=subject, body=body)
    return AutomationCore(name=title, trigger=trigger, actions=[action])
