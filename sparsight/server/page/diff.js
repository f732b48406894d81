// Which words of a text another one does not have, by their longest common subsequence.

export function differences(text, other) {
  const words = text.split(/(\s+)/), others = other.split(/(\s+)/);
  const lengths = Array.from({ length: words.length + 1 }, () => new Uint16Array(others.length + 1));
  for (let i = words.length - 1; i >= 0; i--)
    for (let j = others.length - 1; j >= 0; j--)
      lengths[i][j] = words[i] === others[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  const parts = [];
  let i = 0, j = 0;
  while (i < words.length) {
    const same = words[i] === others[j];
    if (!same && j < others.length && lengths[i][j + 1] >= lengths[i + 1][j]) {
      j++;
      continue;
    }
    parts.push({ text: words[i], different: !same && words[i].trim() !== "" });
    i++;
    if (same) j++;
  }
  return parts;
}

// Show a text in an element, with the words marked that the other text does not have.
export function show(element, text, other) {
  element.replaceChildren(
    ...differences(text, other).map((part) => {
      if (!part.different) return document.createTextNode(part.text);
      const mark = document.createElement("mark");
      mark.textContent = part.text;
      return mark;
    }),
  );
}
