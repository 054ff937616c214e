// Calls to the server with the API key, and parsing of server-sent events.

const KEY = "muxjax-key";
let pendingDialog = null; // one dialog at a time

export function forgetKey() {
  sessionStorage.removeItem(KEY);
}

/** Prompts for a key, with one dialog for all waiting calls. Resolves to true if a key was entered. */
export function promptForKey(message) {
  pendingDialog ??= new Promise((resolve) => {
    const dialog = document.getElementById("ask-key");
    const input = document.getElementById("key-text");
    document.getElementById("ask-why").textContent = message;
    input.value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      const entered = dialog.returnValue === "use" && input.value.trim() !== "";
      if (entered) sessionStorage.setItem(KEY, input.value.trim());
      pendingDialog = null;
      resolve(entered);
    }, { once: true });
    dialog.showModal();
  });
  return pendingDialog;
}

/** Calls `fetch` with the API key; prompts for a key if the server requires one. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers });
    if (response.status !== 401) return response;
    document.getElementById("key").hidden = false;
    const message = key ? "The server rejected this key. Enter another one." : "The key is kept in this tab only.";
    forgetKey();
    if (!(await promptForKey(message))) throw Object.assign(new Error("an API key is required"), { name: "NoKey" });
  }
}

/** Yields the parsed data of each server-sent event of a response, up to `[DONE]`. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
