"""A web API made of the declared commands, for FastAPI: the extra `web`, `pip install 'eskernel[web]'`.

    api = FastAPI(lifespan=lifespan)  # which sets api.state.client to a connected `kernel.Client`
    api.include_router(commands_and_queries(app))

It answers `POST /{Aggregate}/{id}/{Command}` and `GET /{Aggregate}/{id}`. An application writes its own endpoints for
what it reads from tables; the other names are for those.
"""

try:
    import fastapi as _fastapi  # noqa: F401 - to say what to install
except ModuleNotFoundError as _missing:
    raise ModuleNotFoundError(
        f"kernel.web needs FastAPI ({_missing}): pip install 'eskernel[web]'", name=_missing.name
    ) from None

from kernel.web.problems import ProblemRoute
from kernel.web.requests import ConnectedClient, OwnWrites
from kernel.web.routes import commands_and_queries
from kernel.web.schemas import problems

__all__ = ["ConnectedClient", "OwnWrites", "ProblemRoute", "commands_and_queries", "problems"]
