//! `baton chat`: a conversation in the terminal, or one question.

use std::io::{BufRead, IsTerminal, stdin};

use anyhow::{Result, bail};
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use crate::api::{Api, Choice, Server};
use crate::print;

/// What is asked of whom.
#[derive(clap::Args)]
pub struct Args {
    /// One question; without it, a conversation
    question: Vec<String>,
    /// Model to ask for [default: the server's first]
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// 0 always takes the likeliest token; more is more varied
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Longest answer
    #[arg(long, value_name = "TOKENS")]
    max_tokens: Option<u32>,
    #[command(flatten)]
    server: Server,
}

/// Talks until the question is answered, or `/exit`, end of input, or Ctrl-C at the prompt.
pub async fn run(args: Args) -> Result<()> {
    let api = args.server.api()?;
    let model = match args.model {
        Some(model) => model,
        None => api.model().await?,
    };
    let choice = Choice { temperature: args.temperature, max_tokens: args.max_tokens };
    let mut messages: Vec<Value> =
        args.system.iter().map(|text| json!({ "role": "system", "content": text })).collect();
    let mut interrupt = signal(SignalKind::interrupt())?;

    if !args.question.is_empty() {
        messages.push(json!({ "role": "user", "content": args.question.join(" ") }));
        return match answer(&api, &model, &messages, &choice, &mut interrupt).await? {
            Answered::Whole(_) => Ok(()),
            Answered::Interrupted(_) => bail!("interrupted"),
        };
    }

    let is_terminal = stdin().is_terminal();
    if is_terminal {
        print(&format!(
            "{model} at {}. /exit or Ctrl-D ends, Ctrl-C cuts an answer short.\n",
            args.server.url()
        ));
    }
    let mut lines = lines();
    loop {
        if is_terminal {
            print("> ");
        }
        let line = tokio::select! {
            line = lines.recv() => line,
            _ = interrupt.recv() => None,
        };
        let Some(line) = line else {
            if is_terminal {
                print("\n");
            }
            return Ok(());
        };
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => return Ok(()),
            text => messages.push(json!({ "role": "user", "content": text })),
        }
        match answer(&api, &model, &messages, &choice, &mut interrupt).await {
            Ok(Answered::Whole(text) | Answered::Interrupted(text)) => {
                messages.push(json!({ "role": "assistant", "content": text }));
            }
            // In a conversation a refusal is said, and the question is as if it had not been asked.
            Err(error) if is_terminal => {
                eprintln!("baton: {error:#}");
                messages.pop();
            }
            Err(error) => return Err(error),
        }
    }
}

enum Answered {
    Whole(String),
    Interrupted(String),
}

/// Prints an answer as it comes. Ctrl-C drops it, which cancels the request on the server.
async fn answer(
    api: &Api,
    model: &str,
    messages: &[Value],
    choice: &Choice,
    interrupt: &mut Signal,
) -> Result<Answered> {
    let mut text = String::new();
    let whole = async {
        let mut answer = api.chat(model, messages, choice).await?;
        while let Some(piece) = answer.next().await? {
            print(&piece);
            text.push_str(&piece);
        }
        Ok(())
    };
    let interrupted: Result<bool> = tokio::select! {
        result = whole => result.map(|()| false),
        _ = interrupt.recv() => Ok(true),
    };
    if !text.is_empty() && !text.ends_with('\n') {
        print("\n");
    }
    Ok(if interrupted? { Answered::Interrupted(text) } else { Answered::Whole(text) })
}

/// Lines of standard input, read by a thread of their own: such a read cannot be cut short.
fn lines() -> mpsc::Receiver<String> {
    let (lines, inbox) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in stdin().lock().lines().map_while(Result::ok) {
            if lines.blocking_send(line).is_err() {
                break;
            }
        }
    });
    inbox
}
