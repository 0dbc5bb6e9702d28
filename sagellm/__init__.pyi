from sagellm import ops as ops
from sagellm.backends.interface import register_backend as register_backend
from sagellm.builder import Graph as Graph
from sagellm.client.responses import ClientError as ClientError
from sagellm.client.unified import UnifiedInferenceClient as UnifiedInferenceClient
from sagellm.client.unified_async import AsyncUnifiedInferenceClient as AsyncUnifiedInferenceClient
from sagellm.errors import UsageError as UsageError
from sagellm.extensions import function as function
from sagellm.extensions import register_engine_kind as register_engine_kind
from sagellm.extensions import register_function as register_function
from sagellm.extensions import register_operator as register_operator
from sagellm.extensions import register_policy as register_policy
from sagellm.extensions import register_strategy as register_strategy
from sagellm.extensions import register_transport as register_transport
from sagellm.graphs.diagnostics import GraphError as GraphError
from sagellm.graphs.models import register_model_family as register_model_family
from sagellm.http_server import serve as serve
from sagellm.http_server import serve_async as serve_async
from sagellm.logs import log as log
from sagellm.runtime.messages import Answer as Answer
from sagellm.runtime.messages import Request as Request
from sagellm.runtime.messages import TokenEvent as TokenEvent
from sagellm.runtime.sampling import Sampling as Sampling
from sagellm.session.requests import RequestError as RequestError
from sagellm.session.requests import RequestFailed as RequestFailed
from sagellm.session.requests import RequestRefused as RequestRefused

__version__: str
