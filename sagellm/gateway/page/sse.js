/** Reads server-sent events (WHATWG HTML, 9.2.6). */

/**
 * Yield the data of each event of a response body.
 *
 * An event that its empty line has not ended is dropped, as the specification has it.
 */
export async function* eventsOf(body) {
  let data = [];
  for await (const line of linesOf(body)) {
    if (line === "") {
      if (data.length) yield data.join("\n");
      data = [];
    } else if (line.startsWith("data:")) {
      data.push(line.slice(line[5] === " " ? 6 : 5));
    }
  }
}

/** Yield each whole line, without its end. Leaving the loop early cancels the body. */
async function* linesOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) yield line.endsWith("\r") ? line.slice(0, -1) : line;
    }
  } finally {
    reader.cancel().catch(() => {}); // a body that has failed cannot be cancelled
  }
}
