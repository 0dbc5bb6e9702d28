"""A helper process that encodes with one tokenizer.json, within limits."""

from sagellm.runtime.models.pipelines import read_tokenizer, set_pipeline
from sagellm.runtime.models.sandbox.messages import Encode, Job, Render, TokenizerFile, Tokens
from sagellm.runtime.models.sandbox.serving import serve


class Encoder:
    """Reads the file, and gives it the pipeline of its class."""

    variables = ()

    def __init__(self, job: Job) -> None:
        assert isinstance(job, TokenizerFile)
        self._tokenizer = read_tokenizer(job.path)
        set_pipeline(self._tokenizer, job.path, job.model_config, job.tokenizer_config)

    def answer(self, work: Render | Encode) -> Tokens:
        assert isinstance(work, Encode)
        batch = self._tokenizer.encode_batch_fast(
            list(work.texts), add_special_tokens=work.add_special_tokens
        )
        return Tokens(tuple(tuple(each.ids) for each in batch))


if __name__ == "__main__":
    serve(Encoder)
