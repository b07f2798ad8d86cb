//! What the Task API answers when it cannot do what was asked: a code that engines act on and a sentence that people read.

use ttrpc::{Code, proto::Status};

/// The most characters of a guest's message: a path of the longest, and what is wrong with it.
const MAX_WORDS: usize = 6000;

/// A refused or failed call.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct TaskError {
    code: Code,
    message: String,
    from_guest: bool,
}

impl TaskError {
    /// With a code of the caller's choice.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            from_guest: false,
        }
    }

    /// What the agent has answered. Its words go to the engine and on to somebody's terminal, so they are cut to [`MAX_WORDS`] characters,
    /// and control characters are made harmless.
    pub fn of_guest(code: Code, message: &str) -> Self {
        let words = message.chars().take(MAX_WORDS).map(|c| match c {
            '\n' | '\t' => c,
            c if c.is_control() => char::REPLACEMENT_CHARACTER,
            c => c,
        });
        Self {
            from_guest: true,
            ..Self::new(code, words.collect::<String>())
        }
    }

    /// Whether these are the agent's own words, and not the shim's about a guest that does not answer.
    pub fn is_of_guest(&self) -> bool {
        self.from_guest
    }

    /// There is no such task or process (any more).
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Code::NOT_FOUND, message)
    }

    /// The id is taken.
    pub fn already_exists(message: impl Into<String>) -> Self {
        Self::new(Code::ALREADY_EXISTS, message)
    }

    /// Not in this state.
    pub fn failed_precondition(message: impl Into<String>) -> Self {
        Self::new(Code::FAILED_PRECONDITION, message)
    }

    /// The request itself is unusable.
    pub fn invalid_argument(message: impl Into<String>) -> Self {
        Self::new(Code::INVALID_ARGUMENT, message)
    }

    /// Not offered.
    pub fn unimplemented(message: impl Into<String>) -> Self {
        Self::new(Code::UNIMPLEMENTED, message)
    }

    /// The host or the guest failed. Engines show the message as it is.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Code::UNKNOWN, message)
    }

    /// The guest did not answer within its bound.
    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(Code::DEADLINE_EXCEEDED, message)
    }

    /// The same code, with what was being done in front.
    #[must_use]
    pub fn context(self, doing: &str) -> Self {
        Self {
            message: format!("{doing}: {}", self.message),
            ..self
        }
    }

    /// The code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.message
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        let mut status = Status::new();
        status.set_code(error.code);
        status.set_message(error.message);
        Self::RpcStatus(status)
    }
}

/// An error with its causes, as one sentence: "a: b: c".
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guests_words_are_cut_and_cleaned() {
        let error = TaskError::of_guest(Code::INTERNAL, "a\x1b[2Jb\nc");
        assert_eq!(error.message(), "a\u{fffd}[2Jb\nc");
        let error = TaskError::of_guest(Code::INTERNAL, &"ä".repeat(3 << 20));
        assert_eq!(error.message().chars().count(), MAX_WORDS);
    }
}
