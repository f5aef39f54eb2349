// Files that people choose or drop.

/** Call `onFiles` with what is chosen in `input` or dropped on `target`. */
export function takeFiles(input, target, onFiles) {
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = ""; // so that the same file can be chosen again
    if (files.length) onFiles(files);
  });
  target.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    target.classList.add("over");
  });
  target.addEventListener("dragleave", () => target.classList.remove("over"));
  target.addEventListener("drop", (event) => {
    event.preventDefault();
    target.classList.remove("over");
    const files = [...event.dataTransfer.files];
    if (files.length) onFiles(files);
  });
}

/** A file dropped beside every target must not replace the page. */
export function ignoreStrayDrops() {
  for (const name of ["dragover", "drop"]) {
    document.addEventListener(name, (event) => event.preventDefault());
  }
}
