"""A helper process that encodes with one tokenizer.json, within limits."""

from sagellm.runtime.models.helper import (
    EncodedTokens,
    EncodeWork,
    HelperJob,
    RenderWork,
    TokenizerJob,
)
from sagellm.runtime.models.helper_main import serve
from sagellm.runtime.models.pipelines import read_tokenizer, set_pipeline


class HelperEncoder:
    """Reads the file, and gives it the pipeline of its class."""

    variables = ()

    def __init__(self, job: HelperJob) -> None:
        assert isinstance(job, TokenizerJob)
        self._tokenizer = read_tokenizer(job.path)
        set_pipeline(self._tokenizer, job.path, job.model_config, job.tokenizer_config)

    def answer(self, work: RenderWork | EncodeWork) -> EncodedTokens:
        assert isinstance(work, EncodeWork)
        batch = self._tokenizer.encode_batch_fast(
            list(work.texts), add_special_tokens=work.add_special_tokens
        )
        return EncodedTokens(tuple(tuple(each.ids) for each in batch))


if __name__ == "__main__":
    serve(HelperEncoder)
