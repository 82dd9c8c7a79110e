// Colours for CUDA C++ and Python: one pass of a regular expression, tokens as elements, never as markup.

const CUDA_WORDS =
  "alignas|asm|auto|break|case|class|const|constexpr|continue|default|do|else|enum|extern|false|for|if|inline|" +
  "namespace|nullptr|operator|return|sizeof|static|static_assert|struct|switch|template|true|typename|using|" +
  "volatile|while|__global__|__device__|__host__|__constant__|__shared__|__forceinline__|__launch_bounds__";
const CUDA_TYPES =
  "bool|char|double|float|float2|float4|half|int|int8_t|int16_t|int32_t|int64_t|long|short|signed|size_t|" +
  "uint8_t|uint16_t|uint32_t|uint64_t|unsigned|void|dim3";
const PYTHON_WORDS = "and|def|else|for|from|if|import|in|is|lambda|None|not|or|return|True|False|self";
const PYTHON_TYPES = "f16|bf16|f32|f64|i8|i16|i32|i64|u8|b1|c64|c128";

const GRAMMARS = {
  cuda: grammar("\\/\\/[^\\n]*|\\/\\*[\\s\\S]*?\\*\\/", '"(?:\\\\.|[^"\\\\\\n])*"', "^[ \\t]*#[^\\n]*", CUDA_WORDS, CUDA_TYPES),
  python: grammar("#[^\\n]*", "\"(?:\\\\.|[^\"\\\\\\n])*\"|'(?:\\\\.|[^'\\\\\\n])*'", "^@\\w+", PYTHON_WORDS, PYTHON_TYPES),
};

function grammar(comment, string, macro, words, types) {
  const number = "\\b(?:0[xX][\\da-fA-F]+|\\d+\\.?\\d*(?:[eE][+-]?\\d+)?)[fFuUlL]*\\b";
  const call = "\\b[A-Za-z_]\\w*(?=\\s*\\()";
  const parts = { c: comment, s: string, m: macro, k: `\\b(?:${words})\\b`, t: `\\b(?:${types})\\b`, n: number, f: call };
  return new RegExp(Object.entries(parts).map(([name, text]) => `(?<${name}>${text})`).join("|"), "gm");
}

function highlighted(text, language) {
  const code = document.createElement("code");
  let at = 0;
  for (const match of text.matchAll(GRAMMARS[language])) {
    const [kind] = Object.entries(match.groups).find(([, found]) => found !== undefined);
    code.append(text.slice(at, match.index), el("span", { class: kind }, match[0]));
    at = match.index + match[0].length;
  }
  code.append(text.slice(at));
  return code;
}

function source(text, language, words) {
  const pre = el("pre", { tabindex: 0, "aria-label": words }, highlighted(text, language));
  const copy = el("button", { type: "button", class: "copy", onclick: () => copied(copy, pre, text) }, "copy");
  return el("div", { class: "source" }, pre, copy);
}

async function copied(button, pre, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(pre); // where a page may not write to the clipboard
    button.textContent = "selected";
  }
  setTimeout(() => (button.textContent = "copy"), 1500);
}
