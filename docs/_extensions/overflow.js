// What is wider than its box on the pages of a built site. NODE_PATH has to lead to playwright-core.
// node docs/_extensions/overflow.js [SITE]
const { readdirSync } = require("fs");
const { join, resolve } = require("path");
const { chromium } = require("playwright-core");

const SITE = resolve(process.argv[2] || "site");
// On a small screen what has a scrollbar of its own may use it.
const MAY_SCROLL = { 1366: false, 400: true };

function tooWide(mayScroll) {
  const page = document.documentElement;
  const found = page.scrollWidth > page.clientWidth ? ["the page"] : [];
  for (const element of document.querySelectorAll("article, article *")) {
    const style = getComputedStyle(element);
    if (!element.clientWidth || element.scrollWidth <= element.clientWidth + 1) continue;
    const scrolls = style.overflowX === "auto" && style.scrollbarWidth !== "none";
    if (style.overflowX === "visible" || (scrolls && mayScroll)) continue;
    found.push(`${element.tagName.toLowerCase()} ${element.textContent.trim().slice(0, 60)}`);
  }
  return found;
}

(async () => {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || "/usr/bin/chromium", args: ["--no-sandbox"] });
  for (const [width, mayScroll] of Object.entries(MAY_SCROLL)) {
    const page = await browser.newPage({ viewport: { width: Number(width), height: 900 } });
    for (const file of readdirSync(SITE, { recursive: true }).filter((name) => name.endsWith("index.html"))) {
      await page.goto(`file://${join(SITE, file)}`);
      for (const wide of await page.evaluate(tooWide, mayScroll)) {
        console.log(`${width} ${file}: ${wide}`);
        process.exitCode = 1;
      }
    }
  }
  await browser.close();
})();
