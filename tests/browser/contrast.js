// Every visible text whose contrast with the ground behind it is below WCAG's AA: 4.5, or 3 for large text.
() => {
  const channels = (colour) => colour.match(/[\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const faults = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const holder = walker.currentNode.parentElement;
    const style = getComputedStyle(holder);
    const isShown = holder.checkVisibility({ visibilityProperty: true }) && style.clipPath === "none";
    if (!walker.currentNode.data.trim() || !isShown || holder.closest(":disabled, noscript, option")) continue;
    const [a, b] = [luminance(channels(style.color)), luminance(ground(holder))].sort((x, y) => y - x);
    const isLarge = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    const ratio = (a + 0.05) / (b + 0.05);
    seen += 1;
    if (ratio < (isLarge ? 3 : 4.5)) faults.push(`${walker.currentNode.data.trim()}: ${ratio.toFixed(2)}`);
  }
  return { seen, faults };
}
