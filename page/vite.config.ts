import { createHash } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig, type Plugin } from "vite";

const out = "../whence/serve/static";

/** Writes export.html beside the page: the same page as one file, into which the server puts what is shared. */
function singleFile(): Plugin {
  return {
    name: "single-file",
    apply: "build",
    writeBundle(_, bundle) {
      const files = Object.values(bundle);
      const script = files.map((file) => (file.type === "chunk" ? file.code : "")).join("").replaceAll("</script", "<\\/script");
      const style = files.map((file) => (file.type === "asset" && file.fileName.endsWith(".css") ? file.source : "")).join("");
      const hash = (text: string) => `'sha256-${createHash("sha256").update(text).digest("base64")}'`;
      const policy = `default-src 'none'; script-src ${hash(script)}; style-src ${hash(style)}; img-src data:; base-uri 'none'; form-action 'none'`;
      const head = readFileSync(`${out}/index.html`, "utf8").replace(/<script[^]*?<\/script>|<link rel="stylesheet"[^>]*>|<link rel="icon"[^>]*>/g, "");
      const page = head
        .replace("<title>", () => `<meta http-equiv="Content-Security-Policy" content="${policy}">\n    <title>`)
        .replace("</head>", () => `  <style>${style}</style>\n  </head>`)
        .replace(
          "</body>",
          () => `  <script type="application/json" id="whence-data">null</script>\n    <script type="module">${script}</script>\n  </body>`,
        );
      writeFileSync(`${out}/export.html`, page);
    },
  };
}

export default defineConfig({
  base: "./",
  plugins: [svelte(), singleFile()],
  build: {
    outDir: out,
    emptyOutDir: true,
    target: "es2022",
    modulePreload: false,
    assetsInlineLimit: 0,
    rolldownOptions: {
      output: { entryFileNames: "assets/page.js", assetFileNames: "assets/page[extname]", codeSplitting: false },
    },
  },
});
