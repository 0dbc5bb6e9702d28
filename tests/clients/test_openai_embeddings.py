"""openai-python's embeddings, in the installed version, against a served graph."""

import pytest

openai = pytest.importorskip("openai")
KEY = "sk-of-the-tests"


@pytest.fixture(scope="module")
def client(serve, tmp_path_factory):
    """A client of graphs/embed.yaml, whose model `embedder` pools rows of sage-tiny."""
    log = tmp_path_factory.mktemp("server") / "embed.log"
    with (
        serve(log, graph="embed") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        yield client


def test_vectors_are_the_same_in_both_encodings(client):
    texts = ["the sun is warm", "the moon is cold", "the sun is warm"]
    coded = client.embeddings.create(model="embedder", input=texts)  # the client asks for base64
    plain = client.embeddings.create(model="embedder", input=texts, encoding_format="float")
    assert [one.index for one in coded.data] == [0, 1, 2]
    first, second, third = (one.embedding for one in coded.data)
    assert len(first) == 128
    assert first == pytest.approx(third, abs=1e-6)
    assert first != pytest.approx(second, abs=1e-3)
    for one, other in zip(coded.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert coded.usage.prompt_tokens == coded.usage.total_tokens > 0


def test_a_text_and_token_ids_and_dimensions(client):
    one = client.embeddings.create(model="embedder", input="hello", dimensions=16)
    assert len(one.data[0].embedding) == 16
    ids = client.embeddings.create(model="embedder", input=[[5, 6], [7]])
    assert len(ids.data) == 2


def test_a_model_that_generates_is_refused(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.embeddings.create(model="sage-tiny", input="hello")
    assert error.value.param == "model"
