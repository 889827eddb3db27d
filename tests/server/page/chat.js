// Chats on the page as a person would, and prints what was seen as one JSON object.
//
//     node chat.js URL CHROMIUM PICTURE SCREENSHOT_PREFIX

import { chromium } from "playwright-core";

const [url, executablePath, picture, prefix] = process.argv.slice(2);
const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
  ],
});
const seen = { errors: [], requests: [] };
try {
  const page = await browser.newPage({ viewport: { width: 900, height: 760 } });
  page.setDefaultTimeout(60000);
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  page.on("console", (message) => {
    if (message.type() === "error") seen.errors.push(message.text());
  });
  page.on("request", (request) => seen.requests.push(request.url()));
  await page.goto(url);
  await page.waitForFunction(() => document.getElementById("model").textContent !== "…");
  seen.model = await page.textContent("#model");
  await page.screenshot({ path: `${prefix}-empty.png` });

  // Every change of the answer's text, to see that it streams.
  await page.evaluate(() => {
    window.lengths = [];
    new MutationObserver(() => {
      const texts = document.querySelectorAll(".turn.assistant .text");
      const length = texts.length ? texts[texts.length - 1].textContent.length : 0;
      if (length && length !== window.lengths.at(-1)) window.lengths.push(length);
    }).observe(document.getElementById("talk"), { childList: true, subtree: true, characterData: true });
  });
  const send = async (text) => {
    await page.getByLabel("Message", { exact: true }).fill(text);
    await page.keyboard.press("Enter");
  };
  const is_done = () => page.waitForFunction(
    () => document.getElementById("send").textContent === "Send");

  await page.getByRole("button", { name: "Settings" }).click();
  await page.getByLabel("System prompt").fill("Be brief.");
  await page.getByLabel("Longest answer").fill("60");
  await page.screenshot({ path: `${prefix}-settings.png` });
  await page.getByRole("button", { name: "Settings" }).click();
  await send("Why is the sky blue?");
  await page.waitForFunction(() => window.lengths.length > 0);
  await is_done();
  seen.lengths = await page.evaluate(() => window.lengths);
  seen.answer = await page.textContent(".turn.assistant .text");
  seen.note = await page.textContent(".turn.assistant .note");

  await page.setInputFiles("#files", picture);
  await page.getByRole("button", { name: "Remove picture 1" }).waitFor();
  await send("What is it?");
  await page.waitForFunction(() => document.querySelectorAll(".turn.assistant").length === 2);
  await is_done();
  seen.pictures = await page.locator(".turn.user img").count();
  seen.notes = await page.locator(".turn.assistant .note").allTextContents();
  await page.screenshot({ path: `${prefix}-light.png` });
  await page.emulateMedia({ colorScheme: "dark" });
  await page.screenshot({ path: `${prefix}-dark.png` });

  await page.getByRole("button", { name: "Settings" }).click();
  await page.getByLabel("Longest answer").fill("");
  await page.getByRole("button", { name: "Settings" }).click();
  // A model this small has said everything before a hand gets to the button: press it at the first
  // words.
  await page.evaluate(() => {
    const answers = document.querySelectorAll(".turn.assistant").length;
    new MutationObserver((_, observer) => {
      const texts = document.querySelectorAll(".turn.assistant .text");
      const button = document.getElementById("send");
      if (texts.length > answers && texts[answers].textContent && button.textContent === "Stop") {
        observer.disconnect();
        button.click();
      }
    }).observe(document.getElementById("talk"), { childList: true, subtree: true, characterData: true });
  });
  await send("Go on for ever.");
  await page.waitForFunction(() => document.querySelectorAll(".turn.assistant").length === 3);
  await is_done();
  seen.stopped = await page.locator(".turn.assistant .note").last().textContent();

  await page.setViewportSize({ width: 380, height: 700 });
  await page.screenshot({ path: `${prefix}-narrow.png` });
  seen.overflow = await page.evaluate(
    () => document.documentElement.scrollWidth > document.documentElement.clientWidth);
  await page.getByRole("button", { name: "New chat" }).click();
  seen.left = await page.locator(".turn").count();
} finally {
  await browser.close();
}
console.log(JSON.stringify(seen));
