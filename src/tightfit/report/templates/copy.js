// A button for each block of lines to paste; without scripts they can be marked and copied by hand.
(() => {
"use strict";
const told = document.createElement("p");
told.className = "unseen";
told.setAttribute("aria-live", "polite");
document.body.append(told);

function mark(block) {
  const range = document.createRange();
  range.selectNodeContents(block);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
}

for (const block of document.querySelectorAll("pre[data-copy]")) {
  const { copy, copied } = block.dataset, button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = copy;
  button.setAttribute("aria-describedby", block.getAttribute("aria-labelledby"));
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(block.textContent);
    } catch {
      mark(block);
      if (!document.execCommand("copy")) return;
    }
    button.textContent = told.textContent = copied;
    setTimeout(() => {
      button.textContent = copy;
      told.textContent = "";
    }, 2000);
  });
  block.after(button);
}
})();
