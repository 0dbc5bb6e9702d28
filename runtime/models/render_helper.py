"""A helper process that renders one chat template, within limits."""

from sagellm.runtime.models.chat import ChatTemplate
from sagellm.runtime.models.conversation import unpack
from sagellm.runtime.models.sandbox.messages import Encode, Job, Render, Template, Text
from sagellm.runtime.models.sandbox.serving import serve


class Renderer:
    """Compiles the template, and says which names it reads."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job, Template)
        self._template = ChatTemplate(job.text, job.special_tokens)
        self.variables = tuple(sorted(self._template.variables))

    def answer(self, work: Render | Encode) -> Text:
        assert isinstance(work, Render)
        return Text(self._template.render(*unpack(work.given)))


if __name__ == "__main__":
    serve(Renderer)
