"""A helper process that renders one chat template, within limits."""

from sagellm.runtime.models.chat import ChatTemplate, unpack_conversation
from sagellm.runtime.models.helper import (
    EncodeWork,
    HelperJob,
    RenderedText,
    RenderWork,
    TemplateJob,
)
from sagellm.runtime.models.helper_main import serve


class HelperRenderer:
    """Compiles the template, and says which names it reads."""

    def __init__(self, job: HelperJob) -> None:
        assert isinstance(job, TemplateJob)
        self._template = ChatTemplate(job.text, job.special_tokens)
        self.variables = tuple(sorted(self._template.variables))

    def answer(self, work: RenderWork | EncodeWork) -> RenderedText:
        assert isinstance(work, RenderWork)
        return RenderedText(self._template.render(*unpack_conversation(work.given)))


if __name__ == "__main__":
    serve(HelperRenderer)
