"""route_model: sends each request to the outlet of its model."""

from dataclasses import dataclass

from sagellm.graphs.vocabulary import REQUEST, ListedPorts, OpSpec, Port, nearest
from sagellm.runtime.messages import Request, TokenEvent, refusal
from sagellm.runtime.operator import Arrival, Draw, Emit, Input, Setup, Step, Terminate


@dataclass(frozen=True, slots=True)
class RouteModelOptions:
    """`models`: names in the graph's table of models; each is an outlet. A request without a model
    goes to the first outlet.
    """

    models: tuple[str, ...]


SPEC = OpSpec(
    "route_model",
    (Port("in", REQUEST),),
    (),
    options=RouteModelOptions,
    signals=frozenset(),
    listed_outlets=ListedPorts("models", REQUEST),
)


@dataclass(frozen=True, slots=True)
class RouteModel:
    """Emits each request at the outlet of its model, and refuses a request for any other model.

    The session already refuses models that are not in the graph, but a user's function before this
    operator may change the model of a request.
    """

    models: tuple[str, ...]

    @property
    def initial(self) -> None:
        return None

    def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
        match happened:
            case Arrival(item=Request() as request) if request.model in self.models:
                return Step(None, (Emit(request, request.model),))
            case Arrival(item=Request(model="") as request):
                return Step(None, (Emit(request, self.models[0]),))
            case Arrival(item=Request() as request):
                return Step(None, (Terminate(self._refusal(request, now)),))
        return Step(None)

    def _refusal(self, request: Request, now: float) -> TokenEvent:
        close = nearest(request.model, self.models)
        hint = f"; did you mean {close!r}?" if close else ""
        error = f"no way leads to the model {request.model!r}{hint}"
        return refusal(request, "refused", now=now, error=error, code="bad_request")


def build(options: RouteModelOptions, setup: Setup) -> RouteModel:
    return RouteModel(tuple(options.models))
